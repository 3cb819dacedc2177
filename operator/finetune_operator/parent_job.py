"""The job whose adapter another one goes on with (model.adapterFrom.jobName): what is seen of it, and what is kept.

Which job it is stands in the status from the first time that it is seen, and its adapter from its commit on: then it
may be deleted. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.job import FineTuneJobSpec
from finetune_api.run import StartingAdapter
from finetune_api.status import AdapterSource, Artifact, ConditionType, FineTuneJobStatus, OperatorRecord, Phase
from finetune_operator.conditions import find
from finetune_operator.job_reader import read_job


@dataclass(frozen=True)
class ParentJob:
    """What is seen of it. end: how it ended, in words; None while it is not over. waits_for: the job that it waits for
    itself. circle: names of jobs that wait one for another, from itself to the one that waits for it."""

    uid: str
    phase: Phase
    end: str | None
    artifact: Artifact | None
    waits_for: str | None = None
    circle: tuple[str, ...] = ()


def read_parent(body: Mapping[str, Any]) -> ParentJob:
    """Read the job as it is stored."""
    job = read_job(body)
    finished = find(job.status, ConditionType.FINISHED)
    end = f"{finished.reason}: {finished.message}" if job.finished and finished is not None else None
    return ParentJob(
        uid=job.uid,
        phase=job.status.phase or Phase.PENDING,
        end=end,
        artifact=job.status.artifacts[0] if end is not None and job.status.artifacts else None,
        waits_for=awaited_parent(job.spec, job.status) if job.spec is not None and end is None else None,
    )


def awaited_parent(spec: FineTuneJobSpec, status: FineTuneJobStatus) -> str | None:
    """Return the name of the job whose adapter this one waits for; None where there is none, or it has come."""
    source = spec.model.adapter_from
    return source.job_name if source is not None and starting_adapter(spec, status) is None else None


def kept_source(status: FineTuneJobStatus) -> AdapterSource | None:
    """Return what the status holds of the job and its adapter."""
    return status.record.adapter_from if status.record is not None else None


def starting_adapter(spec: FineTuneJobSpec, status: FineTuneJobStatus) -> StartingAdapter | None:
    """Return the adapter that training goes on with; None where it begins with a new one, or while there is none."""
    source = spec.model.adapter_from
    if source is None:
        return None
    if source.uri is not None:
        return StartingAdapter(uri=source.uri)
    kept = kept_source(status)
    return StartingAdapter(uri=kept.uri, digest=kept.digest) if kept is not None and kept.uri is not None else None


def with_parent(status: FineTuneJobStatus, parent: ParentJob | None) -> FineTuneJobStatus:
    """Keep which job it is, and its adapter once that is committed."""
    kept = kept_source(status)
    if parent is None or (kept is not None and kept.job_uid != parent.uid):
        return status
    artifact = parent.artifact
    found = AdapterSource(
        job_uid=parent.uid,
        uri=artifact.uri if artifact is not None else None,
        digest=artifact.digest if artifact is not None else None,
    )
    record = (status.record or OperatorRecord()).model_copy(update={"adapter_from": found})
    return status.model_copy(update={"record": record})
