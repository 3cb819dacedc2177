"""What is read of the job whose adapter another one waits for."""

from typing import Any

import pytest

from finetune_operator.parent_job import read_parent
from status_samples import ARTIFACT, SPEC

WAITING = SPEC | {"model": SPEC["model"] | {"adapterFrom": {"jobName": "cpt"}}}


def job(spec: dict[str, Any], *, over: bool, **status: Any) -> dict[str, Any]:
    meta = {"name": "sft", "namespace": "a", "uid": "uid-of-sft", "generation": 1, "resourceVersion": "1"}
    verdict = {"type": "Finished", "status": str(over), "reason": "NoAdapterToCome", "message": "none",
               "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1}  # fmt: skip
    return {"metadata": meta, "spec": spec, "status": {"conditions": [verdict], **status}}


@pytest.mark.parametrize("over", [False, True])
def test_an_adapter_counts_from_the_verdict_on(over: bool) -> None:
    found = read_parent(job(SPEC, over=over, artifacts=[ARTIFACT])).artifact
    assert (found is not None) == over


@pytest.mark.parametrize(("over", "waits_for"), [(False, "cpt"), (True, None)])
def test_a_job_that_is_over_waits_for_none(over: bool, waits_for: str | None) -> None:
    assert read_parent(job(WAITING, over=over)).waits_for == waits_for
