"""What the platform team decides: the operator's environment and the runtimes file mounted from Helm values."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from finetune_api.base import Str256
from finetune_api.job import Cores, Cpu, DnsName, DnsSubdomain, Quantity

MAX_INTERVAL_S = 120  # below health.STALL_S: what is done more seldom would look stalled

# Set by the manifest itself; a runtime that changed them would break the read-only root or the GPU isolation.
RESERVED_ENV = frozenset({
    "HOME", "HF_HOME", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "USER",
    "HF_HUB_OFFLINE", "POD_UID", "NVIDIA_VISIBLE_DEVICES", "AWS_EC2_METADATA_DISABLED",
})  # fmt: skip


class SettingsError(Exception):
    """The operator cannot start, or a changed runtimes file cannot be used: says which field and why."""


class _Closed(BaseModel):
    """Unknown fields are errors: a misspelt value in Helm must not be ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


def _not_reserved(env: dict[str, str]) -> dict[str, str]:
    taken = sorted(RESERVED_ENV.intersection(env))
    if taken:
        raise ValueError(f"{', '.join(taken)} cannot be set by a runtime")
    return env


Env = Annotated[dict[str, str], AfterValidator(_not_reserved)]


class Toleration(_Closed):
    key: str | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None


class Gpu(_Closed):
    """What is added to pods that train on a GPU."""

    resource_name: Str256 = "nvidia.com/gpu"
    node_selector: dict[str, str] = Field(default_factory=dict[str, str])
    tolerations: list[Toleration] = Field(default_factory=list[Toleration])


class TrainDefaults(_Closed):
    """The train pod, where the job does not ask for something else."""

    cpu: Cores | Cpu = "4"
    memory: Quantity = "16Gi"
    gpus_per_node: int = Field(default=0, ge=0, le=1)
    ephemeral_storage: Quantity = "20Gi"
    shared_memory: Quantity = "1Gi"  # of /dev/shm; counts in the memory limit


class PrepareDefaults(_Closed):
    """The prepare pod, which never gets a GPU."""

    cpu: Cores | Cpu = "2"
    memory: Quantity = "4Gi"
    ephemeral_storage: Quantity = "20Gi"


class Runtime(_Closed):
    """One entry of the runtimes file; a snapshot of it lies in the ConfigMap of every job that uses it."""

    image: Str256
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: list[DnsSubdomain] = Field(default_factory=list[str])
    node_selector: dict[str, str] = Field(default_factory=dict[str, str])
    tolerations: list[Toleration] = Field(default_factory=list[Toleration])
    priority_class_name: DnsSubdomain | None = None
    pod_labels: dict[str, str] = Field(default_factory=dict[str, str])
    pod_annotations: dict[str, str] = Field(default_factory=dict[str, str])
    env: Env = Field(default_factory=dict[str, str])
    # Whether pods without credentials of their own take the role of their node, from the metadata service.
    node_identity: bool = False
    termination_grace_period_seconds: int = Field(default=120, ge=5, le=3600)
    gpu: Gpu = Gpu()
    defaults: TrainDefaults = TrainDefaults()
    prepare: PrepareDefaults = PrepareDefaults()


def runtime_of_snapshot(text: str) -> Runtime:
    """Return the runtime that a job was started with. Raises pydantic.ValidationError.

    A job that began before there was `nodeIdentity` goes on with what it had."""
    runtime = Runtime.model_validate_json(text)
    if "node_identity" in runtime.model_fields_set:
        return runtime
    return runtime.model_copy(update={"node_identity": True})


class _RuntimesFile(_Closed):
    runtimes: dict[DnsName, Runtime]


def parse_runtimes(text: str) -> dict[str, Runtime]:
    """Runtimes by name from YAML or JSON. Raises SettingsError that names the field."""
    try:
        return dict(_RuntimesFile.model_validate(yaml.safe_load(text)).runtimes)
    except yaml.YAMLError as error:
        raise SettingsError(f"the runtimes file is not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SettingsError(f"the runtimes file has a mistake at {place}: {first['msg']}") from error


@dataclass(frozen=True)
class Settings:
    """The operator's own environment. Durations in seconds."""

    namespace: str = "finetune-system"
    identity: str = "finetune-operator"
    watch_namespaces: tuple[str, ...] = ()  # empty: the whole cluster
    runtimes_file: Path = Path("/etc/finetune/runtimes.yaml")
    http_port: int = 8080
    workers: int = 8
    resync_interval_s: float = 60
    progress_interval_s: float = 15
    lease_duration_s: float = 30
    log_level: str = "INFO"

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """Raises SettingsError for a number that is none or out of bounds, and for an unknown level."""
        namespaces = [name.strip() for name in env.get("FINETUNE_WATCH_NAMESPACES", "").split(",")]
        return cls(
            namespace=env.get("FINETUNE_NAMESPACE", cls.namespace),
            identity=env.get("FINETUNE_IDENTITY") or socket.gethostname(),
            watch_namespaces=tuple(sorted({name for name in namespaces if name})),
            runtimes_file=Path(env.get("FINETUNE_RUNTIMES_FILE", str(cls.runtimes_file))),
            http_port=int(_number(env, "FINETUNE_HTTP_PORT", cls.http_port, 0, 65535)),
            workers=int(_number(env, "FINETUNE_WORKERS", cls.workers, 1, 64)),
            resync_interval_s=_number(env, "FINETUNE_RESYNC_INTERVAL_S", cls.resync_interval_s, 1, MAX_INTERVAL_S),
            progress_interval_s=_number(
                env, "FINETUNE_PROGRESS_INTERVAL_S", cls.progress_interval_s, 1, MAX_INTERVAL_S
            ),
            lease_duration_s=_number(env, "FINETUNE_LEASE_DURATION_S", cls.lease_duration_s, 2, 3 * MAX_INTERVAL_S),
            log_level=_level(env.get("FINETUNE_LOG_LEVEL", cls.log_level)),
        )


def _level(name: str) -> str:
    if name not in logging.getLevelNamesMapping():
        raise SettingsError(f"FINETUNE_LOG_LEVEL is {name!r}; write DEBUG, INFO, WARNING or ERROR")
    return name


def _number(env: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    text = env.get(name, "")
    try:
        value = float(text) if text else float(default)
    except ValueError:
        raise SettingsError(f"{name} is {text!r}, which is not a number") from None
    if not low <= value <= high:
        raise SettingsError(f"{name} is {text}; write a number from {low:g} to {high:g}")
    return value
