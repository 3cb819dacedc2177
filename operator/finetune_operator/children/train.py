"""The train stage: one pod, with or without a GPU, which trains what was prepared."""

from finetune_api.names import Stage
from finetune_operator.children.base import Manifest, PodParts, Run, k8s_job


def render(run: Run, attempt: int, plan_digest: str | None) -> list[Manifest]:
    """Return what is created for one attempt, in this order. plan_digest: of the plan that it is to train."""
    # The default of 64 MiB breaks data loaders; what is used counts in the memory limit.
    shared_memory = {"medium": "Memory", "sizeLimit": run.runtime.defaults.shared_memory}
    parts = PodParts(
        resources=run.config.resources,
        args=[] if plan_digest is None else [f"--plan-digest={plan_digest}"],
        volumes=[{"name": "shm", "emptyDir": shared_memory}],
        mounts=[{"name": "shm", "mountPath": "/dev/shm"}],
    )
    return [k8s_job(run, Stage.TRAIN, attempt, parts)]
