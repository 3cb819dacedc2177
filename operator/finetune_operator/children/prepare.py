"""The prepare stage: one pod without a GPU, which reads the data and writes the plan."""

from finetune_api import names
from finetune_api.names import Stage
from finetune_api.run import RunResources
from finetune_operator.children.base import Manifest, PodParts, Run, default_resources, k8s_job, pii_secret


def resources(run: Run) -> RunResources:
    """Return what the pod may use."""
    asked = run.config.spec.resources and run.config.spec.resources.prepare
    # Only configurations of an earlier operator say nothing of prepare.
    return run.config.prepare_resources or default_resources(run.runtime, Stage.PREPARE).with_asked(asked)


def render(run: Run, attempt: int) -> list[Manifest]:
    """Return what is created for one attempt, in this order."""
    volumes, mounts = _pii_key(run)
    return [k8s_job(run, Stage.PREPARE, attempt, PodParts(resources=resources(run), volumes=volumes, mounts=mounts))]


def _pii_key(run: Run) -> tuple[list[Manifest], list[Manifest]]:
    """Return (volumes, mounts) with the key of the pseudonyms, nothing else of its Secret; train has no use for it."""
    secret = pii_secret(run.config.spec)
    if secret is None:
        return [], []
    items = [{"key": names.PII_SECRET_KEY, "path": names.PII_SECRET_KEY}]
    volume: Manifest = {"name": names.PII_KEY_VOLUME, "secret": {"secretName": secret.name, "items": items}}
    return [volume], [{"name": names.PII_KEY_VOLUME, "mountPath": names.PII_KEY_DIR, "readOnly": True}]
