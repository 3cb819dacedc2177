"""What a runtime's policy lets jobs learn, and what a refused user reads."""

from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_api.platform import DataPolicy
from finetune_api.reasons import Reason
from finetune_operator.data_policy import refusal
from finetune_operator.decide import decide
from finetune_operator.decision import CreateK8sJob
from finetune_operator.job_reader import FineTuneJob, read_job
from finetune_operator.observation import Observation
from status_samples import DIGEST, SPEC

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LICENSES = {"allowedLicenses": ["MIT", "Apache-2.0"]}
PREFIXES = {
    "highestConfidentiality": [
        {"prefix": "s3://adapters/", "highest": "Internal"},
        {"prefix": "s3://adapters/public/", "highest": "Public"},
    ]
}


def policy(**fields: Any) -> DataPolicy:
    return DataPolicy.model_validate({"contact": "legal@example.com"} | fields)


def job(
    *datasets: dict[str, Any], output: str = "s3://adapters/bot", status: dict[str, Any] | None = None, **spec: Any
) -> FineTuneJob:
    meta = {"name": "bot", "namespace": "a", "uid": "1a2b3c4d", "generation": 1}
    rows = [{"uri": f"s3://data/{number}/"} | each for number, each in enumerate(datasets or ({},))]
    return read_job(
        {"metadata": meta, "spec": SPEC | {"datasets": rows, "output": {"uri": output}} | spec, "status": status or {}}
    )


def words(given: FineTuneJob, asked: DataPolicy) -> str | None:
    assert given.spec is not None
    return refusal(given.spec, asked, "default")


@pytest.mark.parametrize(
    ("asked", "dataset", "output"),
    [
        ({}, {}, "s3://adapters/bot"),
        (LICENSES, {"license": "MIT"}, "s3://adapters/bot"),
        (LICENSES, {"license": "mit OR GPL-3.0-only"}, "s3://adapters/bot"),
        (LICENSES, {"licenseField": "license", "licenses": ["MIT", "apache-2.0"]}, "s3://adapters/bot"),
        (PREFIXES, {"confidentiality": "Internal"}, "s3://adapters/bot"),
        (PREFIXES, {"confidentiality": "Internal"}, "s3://adapters/publicity"),
        (PREFIXES, {"confidentiality": "Public"}, "s3://adapters/public"),
        ({"highestConfidentiality": [{"prefix": "s3://", "highest": "Restricted"}]}, {"confidentiality": "Restricted"}, "s3://a-b/c"),
        ({"requiredFields": ["source", "copyrightHolder"]}, {"source": "a crawl", "copyrightHolder": "us"}, "s3://a-b/c"),
    ],
)  # fmt: skip
def test_data_that_a_policy_allows_is_taken(asked: dict[str, Any], dataset: dict[str, Any], output: str) -> None:
    assert words(job(dataset, output=output), policy(**asked)) is None


@pytest.mark.parametrize(
    ("asked", "dataset", "output", "said"),
    [
        (LICENSES, {}, "s3://adapters/bot", "datasets[0]: license is not said, and allowed is MIT, Apache-2.0"),
        (LICENSES, {"name": "chats", "license": "GPL-3.0-only"}, "s3://adapters/bot",
         "datasets[0] (chats): license is GPL-3.0-only, and allowed is MIT, Apache-2.0"),
        (LICENSES, {"license": "MIT AND GPL-3.0-only"}, "s3://adapters/bot", "license is MIT AND GPL-3.0-only"),
        (LICENSES, {"license": "(MIT"}, "s3://adapters/bot", "license is (MIT"),
        (LICENSES, {"licenseField": "license"}, "s3://adapters/bot", "license is not said"),
        (LICENSES, {"licenseField": "l", "licenses": ["MIT", "free for all"]}, "s3://adapters/bot",
         "licenses takes rows under free for all"),
        (LICENSES, {"license": "GPL-2.0-only", "licenseField": "l", "licenses": ["MIT"]}, "s3://adapters/bot",
         "license is GPL-2.0-only"),
        (PREFIXES, {}, "s3://adapters/bot",
         "confidentiality is not said, and below s3://adapters/ allowed is Public, Internal"),
        (PREFIXES, {"confidentiality": "Confidential"}, "s3://adapters/bot",
         "confidentiality is Confidential, and below s3://adapters/ allowed is Public, Internal"),
        (PREFIXES, {"confidentiality": "Internal"}, "s3://adapters/public/bot",
         "confidentiality is Internal, and below s3://adapters/public/ allowed is Public"),
        (PREFIXES, {"confidentiality": "Public"}, "s3://elsewhere/bot",
         "output.uri s3://elsewhere/bot lies below no prefix that data may go to: s3://adapters/, s3://adapters/public/"),
        ({"requiredFields": ["source"]}, {"license": "MIT"}, "s3://a-b/c",
         "datasets[0]: source is not said, and has to be"),
    ],
)  # fmt: skip
def test_a_refused_user_reads_dataset_field_what_was_found_what_is_allowed_and_whom_to_ask(
    asked: dict[str, Any], dataset: dict[str, Any], output: str, said: str
) -> None:
    found = words(job(dataset, output=output), policy(**asked)) or ""
    assert said in found
    assert found.startswith("runtime default does not take the data of this job; ask legal@example.com, or ")


def test_of_many_findings_the_first_are_told_and_the_others_counted() -> None:
    found = words(job({"license": "MIT"}, *[{}] * 9), policy(**LICENSES)) or ""
    assert "datasets[1]: license" in found
    assert found.endswith("datasets[3]: license is not said, and allowed is MIT, Apache-2.0; and 6 more such findings")


def test_a_field_that_is_missing_is_told_once() -> None:
    asked = policy(requiredFields=["license", "confidentiality"], **LICENSES, **PREFIXES)
    found = words(job(), asked) or ""
    assert (found.count("license is"), found.count("confidentiality is")) == (1, 1)


def refused(given: FineTuneJob, asked: DataPolicy | None) -> bool:
    """Whether the job ends by the policy. It begins otherwise, or goes on."""
    decision = decide(given, Observation(policy=asked), NOW)
    verdict = next(each for each in decision.status.conditions if each.type == "Succeeded")
    if verdict.reason == Reason.REFUSED_BY_POLICY:
        assert decision.actions == ()
        assert (decision.status.phase, verdict.status) == ("Failed", "False")
        assert decision.status.attempts == []
        assert "legal@example.com" in verdict.message
        return True
    return False


def test_a_refused_job_ends_before_any_pod_and_an_allowed_one_begins() -> None:
    assert refused(job(), policy(**LICENSES))
    assert not refused(job({"license": "MIT"}), policy(**LICENSES))
    assert not refused(job(), None)
    (action,) = decide(job({"license": "MIT"}), Observation(policy=policy(**LICENSES)), NOW).actions
    assert isinstance(action, CreateK8sJob)


AFTER = SPEC["model"] | {"adapterFrom": {"jobName": "cpt"}}


@pytest.mark.parametrize("spec", [{"suspend": True}, {"startPolicy": "PlanOnly"}, {"model": AFTER}])
def test_it_is_told_at_once_whatever_else_the_job_would_wait_for(spec: dict[str, Any]) -> None:
    assert refused(job(**spec), policy(**LICENSES))


@pytest.mark.parametrize(
    "status",
    [
        {"record": {"runDigest": DIGEST}},
        {"attempts": [{"number": 1, "stage": "prepare", "class": "Running", "startedAt": "2026-01-01T00:00:00Z"}]},
    ],
    ids=["its configuration is made", "of an earlier operator"],
)
def test_a_change_of_policy_ends_no_job_that_has_begun(status: dict[str, Any]) -> None:
    assert not refused(job(status=status), policy(**LICENSES))


def test_an_attempt_of_which_nothing_was_made_is_no_beginning() -> None:
    status = {"attempts": [{"number": 1, "stage": "prepare", "class": "Running"}]}
    found = decide(job(status=status), Observation(policy=policy(**LICENSES)), NOW)
    assert found.status.phase == "Failed"
    assert found.actions == ()
