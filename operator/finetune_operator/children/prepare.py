"""The prepare stage: one pod without a GPU, which reads the data and writes the plan."""

from finetune_api.names import Stage
from finetune_api.run import RunResources
from finetune_operator.children.base import Manifest, PodParts, Run, default_resources, k8s_job


def resources(run: Run) -> RunResources:
    """Return what the pod may use."""
    asked = run.config.spec.resources and run.config.spec.resources.prepare
    # Only configurations of an earlier operator say nothing of prepare.
    return run.config.prepare_resources or default_resources(run.runtime, Stage.PREPARE).with_asked(asked)


def render(run: Run, attempt: int) -> list[Manifest]:
    """Return what is created for one attempt, in this order."""
    return [k8s_job(run, Stage.PREPARE, attempt, PodParts(resources=resources(run)))]
