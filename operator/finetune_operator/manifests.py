"""What is created for a job: one immutable ConfigMap, and a Kubernetes Job for each attempt. Pure.

The Job is a single-pod Indexed Job under the restricted Pod Security profile. `backoffLimit: 0` and the pod
failure policy make Kubernetes replace disrupted pods by itself, with the operator down, and leave every other
end to us: a kubelet or Job retry could not count, wait, or tell a user's mistake from a fault.
"""

import json
from collections.abc import Mapping
from typing import Any

from finetune_api import defaults, names
from finetune_api.job import FineTuneJobSpec
from finetune_api.layout import join
from finetune_api.names import Stage
from finetune_api.quantity import cpu_count, quantity_bytes
from finetune_api.reasons import FINAL_EXIT_CODES
from finetune_api.run import CONTRACT_VERSION, JobRef, RunConfig, RunResources, StorageConfig
from finetune_operator.job_reader import FineTuneJob
from finetune_operator.observed import ANNOTATION_GPUS
from finetune_operator.settings import Runtime, Toleration

RUNTIME_FILE = "runtime.json"
USER_ID = 10001
UNREACHABLE_S = 60

Manifest = dict[str, Any]


def run_config(job: FineTuneJob, spec: FineTuneJobSpec, runtime: Runtime) -> RunConfig:
    """Every default of the platform decided, so that all attempts of the job run alike."""
    storage = spec.storage
    endpoint = storage.endpoint if storage else None
    path_style = storage.path_style if storage else None
    return RunConfig(
        contract_version=CONTRACT_VERSION,
        job=JobRef(name=job.name, namespace=job.namespace, uid=job.uid, created_at=job.created_at),
        spec=spec,
        run_uri=join(spec.output.uri, names.run_name(job.name, job.uid)),
        image=runtime.image,
        storage=StorageConfig(
            endpoint=endpoint,
            region=defaults.given(storage.region if storage else None, defaults.REGION),
            path_style=endpoint is not None if path_style is None else path_style,
            credentials_dir=names.CREDENTIALS_DIR if storage and storage.secret_ref else None,
            ca_bundle_path=f"{names.CA_BUNDLE_DIR}/{names.CA_BUNDLE_KEY}" if storage and storage.ca_bundle else None,
        ),
        resources=_default_resources(runtime, Stage.TRAIN).with_asked(spec.resources),
        prepare_resources=_prepare_resources(spec, runtime),
        grace_period_s=runtime.termination_grace_period_seconds,
    )


def _default_resources(runtime: Runtime, stage: Stage) -> RunResources:
    defaults = runtime.defaults if stage == Stage.TRAIN else runtime.prepare
    return RunResources(
        cpu_count=cpu_count(defaults.cpu),
        memory_bytes=quantity_bytes(defaults.memory),
        disk_bytes=quantity_bytes(defaults.ephemeral_storage),
        gpus=runtime.defaults.gpus_per_node if stage == Stage.TRAIN else 0,
    )


def _prepare_resources(spec: FineTuneJobSpec, runtime: Runtime) -> RunResources:
    return _default_resources(runtime, Stage.PREPARE).with_asked(spec.resources and spec.resources.prepare)


def _resources_of(config: RunConfig, runtime: Runtime, stage: Stage) -> RunResources:
    """Return what the stage's pod may use. Only configurations of an earlier operator say nothing of prepare."""
    if stage == Stage.TRAIN:
        return config.resources
    return config.prepare_resources or _prepare_resources(config.spec, runtime)


def config_map(job: FineTuneJob, config: RunConfig, runtime: Runtime) -> Manifest:
    """The run's configuration for the trainer, and the runtime as it was, for the operator after an upgrade."""
    meta = _metadata(job, names.run_name(job.name, job.uid), {
        names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
        names.LABEL_JOB_UID: job.uid,
        names.LABEL_JOB_NAME: job.name,
    })  # fmt: skip
    snapshot = json.dumps(runtime.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": meta,
        "immutable": True,
        "data": {names.CONFIG_FILE: config.to_json(), RUNTIME_FILE: snapshot},
    }


def job_manifest(
    job: FineTuneJob, config: RunConfig, runtime: Runtime, stage: Stage, attempt: int, plan_digest: str | None
) -> Manifest:
    """The Kubernetes Job of one attempt. `plan_digest` belongs to train alone: it trains what was prepared."""
    labels = names.child_labels(job.name, job.uid, stage, attempt)
    meta = _metadata(job, names.child_name(job.name, job.uid, stage, attempt), labels)
    gpus = _resources_of(config, runtime, stage).gpus
    ignore = {"type": "DisruptionTarget", "status": "True"}
    exit_codes = {"containerName": names.CONTAINER, "operator": "In", "values": list(FINAL_EXIT_CODES)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
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
                    "labels": {**runtime.pod_labels, **_NO_SIDECAR_LABELS, **labels},
                    "annotations": {**runtime.pod_annotations, **_POD_ANNOTATIONS, ANNOTATION_GPUS: str(gpus)},
                },
                "spec": _pod_spec(job, config, runtime, stage, attempt, plan_digest, gpus),
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


def _metadata(job: FineTuneJob, name: str, labels: Mapping[str, str]) -> Manifest:
    owner = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {"name": name, "namespace": job.namespace, "labels": dict(labels), "ownerReferences": [owner]}


def _pod_spec(
    job: FineTuneJob,
    config: RunConfig,
    runtime: Runtime,
    stage: Stage,
    attempt: int,
    plan_digest: str | None,
    gpus: int,
) -> Manifest:
    storage = config.spec.storage
    volumes, mounts = _volumes(job, config, runtime, stage)
    args = [stage.value, f"--config={names.CONFIG_DIR}/{names.CONFIG_FILE}", f"--attempt={attempt}"]
    if plan_digest is not None:
        args.append(f"--plan-digest={plan_digest}")
    limits = _limits(_resources_of(config, runtime, stage), runtime)
    gpu_selector = runtime.gpu.node_selector if gpus else {}
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
        "volumes": volumes,
        "containers": [
            {
                "name": names.CONTAINER,
                "image": runtime.image,
                "imagePullPolicy": runtime.image_pull_policy,
                "args": args,
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
                "volumeMounts": mounts,
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


def _volumes(
    job: FineTuneJob, config: RunConfig, runtime: Runtime, stage: Stage
) -> tuple[list[Manifest], list[Manifest]]:
    disk = f"{_resources_of(config, runtime, stage).disk_bytes // 2**20}Mi"
    run = {"name": names.run_name(job.name, job.uid), "items": [{"key": names.CONFIG_FILE, "path": names.CONFIG_FILE}]}
    volumes: list[Manifest] = [
        {"name": "config", "configMap": run},
        {"name": "scratch", "emptyDir": {"sizeLimit": disk}},
    ]
    mounts: list[Manifest] = [
        {"name": "config", "mountPath": names.CONFIG_DIR, "readOnly": True},
        {"name": "scratch", "mountPath": names.SCRATCH_DIR},
    ]
    if stage == Stage.TRAIN:
        # The default of 64 MiB breaks data loaders; what is used counts in the memory limit.
        memory = {"medium": "Memory", "sizeLimit": runtime.defaults.shared_memory}
        volumes.append({"name": "shm", "emptyDir": memory})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    storage = config.spec.storage
    if storage is not None and storage.secret_ref is not None:
        volumes.append({"name": "credentials", "secret": {"secretName": storage.secret_ref.name}})
        mounts.append({"name": "credentials", "mountPath": names.CREDENTIALS_DIR, "readOnly": True})
    if storage is not None and storage.ca_bundle is not None:
        source = {
            "name": storage.ca_bundle.config_map_ref.name,
            "items": [{"key": names.CA_BUNDLE_KEY, "path": names.CA_BUNDLE_KEY}],
        }
        volumes.append({"name": "ca", "configMap": source})
        mounts.append({"name": "ca", "mountPath": names.CA_BUNDLE_DIR, "readOnly": True})
    return volumes, mounts


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
