"""What the Kubernetes Jobs of both stages have in common. Pure.

The Job is a single-pod Indexed Job under the restricted Pod Security profile. `backoffLimit: 0` and the pod
failure policy make Kubernetes replace disrupted pods by itself, with the operator down, and leave every other
end to us: a kubelet or Job retry could not count, wait, or tell a user's mistake from a fault.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_api import names
from finetune_api.job import FineTuneJobSpec
from finetune_api.names import Stage
from finetune_api.objects import LocalObjectRef
from finetune_api.platform import Runtime, Toleration
from finetune_api.quantity import cpu_count, quantity_bytes
from finetune_api.reasons import FINAL_EXIT_CODES
from finetune_api.run import RunConfig, RunResources
from finetune_operator.job_reader import FineTuneJob
from finetune_operator.observed import ANNOTATION_GPUS

USER_ID = 10001
UNREACHABLE_S = 60

Manifest = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all attempts of a job have in common, as it was when the first began.

    name, digest: of its ConfigMap. config_digest: of the file that the trainer reads; None where it is not told."""

    job: FineTuneJob
    config: RunConfig
    runtime: Runtime
    name: str
    digest: str
    config_digest: str | None


@dataclass(frozen=True, kw_only=True)
class PodParts:
    """What the pod of a stage has besides what all have."""

    resources: RunResources
    args: list[str] = field(default_factory=list[str])
    volumes: list[Manifest] = field(default_factory=list[Manifest])
    mounts: list[Manifest] = field(default_factory=list[Manifest])


def pii_secret(spec: FineTuneJobSpec) -> LocalObjectRef | None:
    """Return the Secret with the key of the job's pseudonyms, if it has one."""
    pii = spec.preprocessing and spec.preprocessing.pii
    return pii.key_secret_ref if pii is not None else None


def default_resources(runtime: Runtime, stage: Stage) -> RunResources:
    """Return what a pod of the stage may use where the job asks for nothing else."""
    given = runtime.defaults if stage == Stage.TRAIN else runtime.prepare
    return RunResources(
        cpu_count=cpu_count(given.cpu),
        memory_bytes=quantity_bytes(given.memory),
        disk_bytes=quantity_bytes(given.ephemeral_storage),
        gpus=runtime.defaults.gpus_per_node if stage == Stage.TRAIN else 0,
    )


def k8s_job(run: Run, stage: Stage, attempt: int, parts: PodParts) -> Manifest:
    """Return the Kubernetes Job of one attempt."""
    labels = names.child_labels(run.job.name, run.job.uid, stage, attempt)
    name = names.child_name(run.job.name, run.job.uid, stage, attempt)
    ignore = {"type": "DisruptionTarget", "status": "True"}
    exit_codes = {"containerName": names.CONTAINER, "operator": "In", "values": list(FINAL_EXIT_CODES)}
    gpus = {ANNOTATION_GPUS: str(parts.resources.gpus)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": owned_metadata(run.job, name, labels),
        "spec": {
            "completionMode": "Indexed",
            "completions": 1,
            "parallelism": 1,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": exit_codes},
                    {"action": "Ignore", "onPodConditions": [ignore]},
                ]
            },
            "template": {
                "metadata": {
                    "labels": {**run.runtime.pod_labels, **_NO_SIDECAR_LABELS, **labels},
                    "annotations": {**run.runtime.pod_annotations, **_POD_ANNOTATIONS, **gpus},
                },
                "spec": _pod_spec(run, stage, attempt, parts),
            },
        },
    }


# A sidecar outlives the trainer and keeps its Job from ever completing.
_NO_SIDECAR_LABELS = {"sidecar.istio.io/inject": "false"}
_POD_ANNOTATIONS = {
    "sidecar.istio.io/inject": "false",
    "linkerd.io/inject": "disabled",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}


def owned_metadata(job: FineTuneJob, name: str, labels: Mapping[str, str]) -> Manifest:
    """Return the metadata of an object that goes when the job goes."""
    owner = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {"name": name, "namespace": job.namespace, "labels": dict(labels), "ownerReferences": [owner]}


def _pod_spec(run: Run, stage: Stage, attempt: int, parts: PodParts) -> Manifest:
    runtime, storage, gpus = run.runtime, run.config.spec.storage, parts.resources.gpus
    gpu_selector = runtime.gpu.node_selector if gpus else {}
    volumes, mounts = _volumes(run, parts.resources)
    limits = _limits(parts.resources, runtime)
    args = [stage.value, f"--config={names.CONFIG_DIR}/{names.CONFIG_FILE}", f"--attempt={attempt}"]
    args += [] if run.config_digest is None else [f"--config-digest={run.config_digest}"]
    spec: Manifest = {
        "restartPolicy": "Never",  # required by podFailurePolicy
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": runtime.termination_grace_period_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": _tolerations(runtime, gpus),
        "nodeSelector": {**runtime.node_selector, **gpu_selector},
        "imagePullSecrets": [{"name": name} for name in runtime.image_pull_secrets],
        "volumes": [*volumes, *parts.volumes],
        "containers": [
            {
                "name": names.CONTAINER,
                "image": runtime.image,
                "imagePullPolicy": runtime.image_pull_policy,
                "args": [*args, *parts.args],
                "env": _env(runtime),
                "ports": [{"name": names.PORT_NAME, "containerPort": names.HTTP_PORT}],
                "resources": {"requests": limits, "limits": limits},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                "terminationMessagePath": names.TERMINATION_LOG,
                "terminationMessagePolicy": "File",  # the fallback would copy log lines into the pod's status
                "volumeMounts": [*mounts, *parts.mounts],
            }
        ],
    }
    if storage is not None and storage.service_account_name is not None:
        spec["serviceAccountName"] = storage.service_account_name
    if runtime.priority_class_name is not None:
        spec["priorityClassName"] = runtime.priority_class_name
    return spec


def _limits(resources: RunResources, runtime: Runtime) -> dict[str, str]:
    limits = {
        "cpu": f"{round(resources.cpu_count * 1000)}m",
        "memory": f"{resources.memory_bytes // 2**20}Mi",
        "ephemeral-storage": f"{resources.disk_bytes // 2**20}Mi",
    }
    return {**limits, runtime.gpu.resource_name: str(resources.gpus)} if resources.gpus else limits


def _volumes(run: Run, resources: RunResources) -> tuple[list[Manifest], list[Manifest]]:
    """Return (volumes, mounts): configuration, scratch, and what the job's storage names."""
    config = {
        "name": run.name,
        "items": [{"key": names.CONFIG_FILE, "path": names.CONFIG_FILE}],
    }
    volumes: list[Manifest] = [
        {"name": "config", "configMap": config},
        {"name": "scratch", "emptyDir": {"sizeLimit": f"{resources.disk_bytes // 2**20}Mi"}},
    ]
    mounts: list[Manifest] = [
        {"name": "config", "mountPath": names.CONFIG_DIR, "readOnly": True},
        {"name": "scratch", "mountPath": names.SCRATCH_DIR},
    ]
    storage = run.config.spec.storage
    if storage is not None and storage.secret_ref is not None:
        volumes.append({"name": "credentials", "projected": {"sources": _credentials(storage.secret_ref.name)}})
        mounts.append({"name": "credentials", "mountPath": names.CREDENTIALS_DIR, "readOnly": True})
    if storage is not None and storage.ca_bundle is not None:
        source = {
            "name": storage.ca_bundle.config_map_ref.name,
            "items": [{"key": names.CA_BUNDLE_KEY, "path": names.CA_BUNDLE_KEY}],
        }
        volumes.append({"name": "ca", "configMap": source})
        mounts.append({"name": "ca", "mountPath": names.CA_BUNDLE_DIR, "readOnly": True})
    return volumes, mounts


def _credentials(secret: str) -> list[Manifest]:
    """Return the keys of the Secret that are mounted: whoever writes a job must not read other Secrets by it."""
    return [
        {"secret": {"name": secret, "items": [{"key": key, "path": key} for key in keys], "optional": optional}}
        for keys, optional in ((names.REQUIRED_SECRET_KEYS, False), (names.OPTIONAL_SECRET_KEYS, True))
    ]


def _env(runtime: Runtime) -> list[Manifest]:
    """Caches go to scratch because the root is read-only; USER is for libraries that ask for a name of the UID."""
    scratch = names.SCRATCH_DIR
    ours = {
        "HOME": scratch,
        "TMPDIR": scratch,
        "HF_HOME": f"{scratch}/huggingface",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
        "XDG_CACHE_HOME": f"{scratch}/cache",
        "USER": "finetune",
        "HF_HUB_OFFLINE": "1",
    }
    # Of the credentials that boto3 looks for, those of the node alone come unasked; IRSA and Pod Identity are no part
    # of the metadata service. Nothing else in the trainer looks for an identity.
    no_node = {} if runtime.node_identity else {"AWS_EC2_METADATA_DISABLED": "true"}
    named = {**runtime.env, **ours, **no_node}
    env: list[Manifest] = [{"name": name, "value": value} for name, value in named.items()]
    return [*env, {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}]


def _tolerations(runtime: Runtime, gpus: int) -> list[Manifest]:
    """A lost node gives its pod back after a minute instead of five."""
    lost = [
        Toleration(
            key=f"node.kubernetes.io/{what}", operator="Exists", effect="NoExecute", toleration_seconds=UNREACHABLE_S
        )
        for what in ("unreachable", "not-ready")
    ]
    gpu = [Toleration(key=runtime.gpu.resource_name, operator="Exists", effect="NoSchedule")] if gpus else []
    chosen = [*runtime.tolerations, *(runtime.gpu.tolerations if gpus else []), *gpu, *lost]
    return [toleration.model_dump(mode="json", by_alias=True, exclude_none=True) for toleration in chosen]
