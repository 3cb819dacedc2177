"""FineTuneJobs as a list brings them, unfinished and finished, with UID uid-NAME in namespace a."""

from typing import Any

from finetune_api import names
from status_samples import SPEC


def finetunejob(name: str, generation: int = 1, version: str = "1", **status: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": "a", "uid": f"uid-{name}", "generation": generation, "resourceVersion": version}
    return {"metadata": meta, "spec": SPEC, "status": status}


def finished_job(
    name: str, at: str = "2026-01-01T00:00:00Z", phase: str = "Succeeded", generation: int = 1, **spec: Any
) -> dict[str, Any]:
    """One whose status was written for generation 1 of its spec."""
    verdict = {
        "type": "Finished", "status": "True", "reason": phase, "message": "", "observedGeneration": 1,
        "lastTransitionTime": at,
    }  # fmt: skip
    body = finetunejob(name, generation, phase=phase, observedGeneration=1, conditions=[verdict])
    return {**body, "spec": SPEC | spec}


def ended_k8s_job(of: str, ttl_seconds: int | None) -> dict[str, Any]:
    """The Kubernetes Job of that FineTuneJob, complete."""
    owner = {"kind": "FineTuneJob", "uid": f"uid-{of}", "controller": True}
    labels = names.child_labels(of, f"uid-{of}", names.Stage.TRAIN, 1)
    meta = {"name": "x", "namespace": "a", "uid": "x", "labels": labels, "ownerReferences": [owner]}
    status = {"conditions": [{"type": "Complete", "status": "True"}]}
    return {"metadata": meta, "spec": {"ttlSecondsAfterFinished": ttl_seconds}, "status": status}
