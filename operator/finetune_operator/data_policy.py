"""Whether the data of a job may be learned where it runs, by the policy of its runtime, and in words why not. Pure."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from finetune_api.governance import Confidentiality, OriginSpec
from finetune_api.job import DatasetSpec, FineTuneJobSpec
from finetune_api.layout import join
from finetune_api.platform import DataPolicy, OutputPrefix, RequiredField
from finetune_api.spdx import may_use
from finetune_api.status import FineTuneJobStatus
from finetune_operator.close_attempts import has_begun

_MAX_SAID = 3  # findings that are told in full
_MAX_LISTED = 12  # names that are listed


class Finding(NamedTuple):
    """A field of a dataset, and what is wrong with it in the policy's eyes."""

    field: str
    words: str


def may_refuse(status: FineTuneJobStatus) -> bool:
    """Return True until the job has begun: from then on no policy ends it, however it changes."""
    made = status.record is not None and status.record.run_digest is not None
    return not made and not has_begun(status)


def refusal(spec: FineTuneJobSpec, policy: DataPolicy, runtime: str) -> str | None:
    """Return why the policy refuses the job: dataset, field, what was found, what is allowed and whom to ask."""
    found = list(_findings(spec, policy))
    if not found:
        return None
    more = f"; and {len(found) - _MAX_SAID} more such findings" if len(found) > _MAX_SAID else ""
    ask = f"ask {policy.contact}, or create the job anew with other data, another output.uri or another runtime"
    return f"runtime {runtime} does not take the data of this job; {ask}: {'; '.join(found[:_MAX_SAID])}{more}"


def _findings(spec: FineTuneJobSpec, policy: DataPolicy) -> Iterator[str]:
    prefix = prefix_of(spec.output.uri, policy.highest_confidentiality)
    if policy.highest_confidentiality and prefix is None:
        prefixes = _listed([each.prefix for each in policy.highest_confidentiality])
        yield f"output.uri {spec.output.uri} lies below no prefix that data may go to: {prefixes}"
    for number, dataset in enumerate(spec.datasets):
        name = f"datasets[{number}]" + (f" ({dataset.name})" if dataset.name else "")
        findings = (*_missing(dataset, policy), *_licenses(dataset, policy))
        said = dict((*findings, *_confidentiality(dataset, prefix)))  # of each field the last
        yield from (f"{name}: {field} {words}" for field, words in said.items())


def _missing(dataset: DatasetSpec, policy: DataPolicy) -> Iterator[Finding]:
    values = dataset.model_dump(by_alias=True, include=set(OriginSpec.model_fields))
    for field in policy.required_fields:
        if values[field] is None:
            yield Finding(field, "is not said, and has to be")


def _licenses(dataset: DatasetSpec, policy: DataPolicy) -> Iterator[Finding]:
    if not policy.allowed_licenses:
        return
    allows = f"and allowed is {_listed(policy.allowed_licenses)}"
    if dataset.license is None and not dataset.licenses:
        yield Finding(RequiredField.LICENSE, f"is not said, {allows}")
    if dataset.license is not None and not may_use(dataset.license, policy.allowed_licenses):
        yield Finding(RequiredField.LICENSE, f"is {dataset.license}, {allows}")
    others = [each for each in dataset.licenses or () if not may_use(each, policy.allowed_licenses)]
    if others:
        yield Finding("licenses", f"takes rows under {_listed(others)}, {allows}")


def _confidentiality(dataset: DatasetSpec, prefix: OutputPrefix | None) -> Iterator[Finding]:
    if prefix is None:
        return
    found, allows = dataset.confidentiality, f"below {prefix.prefix} allowed is {_up_to(prefix.highest)}"
    if found is None:
        yield Finding(RequiredField.CONFIDENTIALITY, f"is not said, and {allows}")
    elif found.rank > prefix.highest.rank:
        yield Finding(RequiredField.CONFIDENTIALITY, f"is {found}, and {allows}")


def _up_to(highest: Confidentiality) -> str:
    return ", ".join(each for each in Confidentiality if each.rank <= highest.rank)


def prefix_of(output_uri: str, prefixes: Sequence[OutputPrefix]) -> OutputPrefix | None:
    """Return the longest prefix that the output lies below; None where it lies below none."""
    folder = join(output_uri, "")
    below = [each for each in prefixes if folder.startswith(each.prefix)]
    return max(below, key=lambda each: len(each.prefix), default=None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
