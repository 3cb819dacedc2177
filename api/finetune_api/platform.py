"""The platform team's half of a job: runtimes, as they stand in Helm values. The chart's schema is made from here."""

import re
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, WithJsonSchema
from pydantic.alias_generators import to_camel

from finetune_api.base import Str256
from finetune_api.governance import Confidentiality
from finetune_api.job import Cores, Cpu, Quantity
from finetune_api.objects import DnsName, DnsSubdomain
from finetune_api.spdx import ONE_LICENSE

# Set by the pod's manifest itself: a runtime that changed them would break the read-only root or the GPU isolation.
RESERVED_ENV = frozenset({
    "HOME", "HF_HOME", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "USER",
    "HF_HUB_OFFLINE", "POD_UID", "NVIDIA_VISIBLE_DEVICES", "AWS_EC2_METADATA_DISABLED",
})  # fmt: skip

_ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
_LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_LABEL_VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
_MAX_VALUE = 4096
_PREFIX = r"^s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/([^ ]*/)?)?$"  # a whole folder, so that no neighbour is meant
_IMAGE = r"^[^ ]+(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}|@sha256:[0-9a-f]{64})$"


def _checked_env(env: dict[str, str]) -> dict[str, str]:
    taken = sorted(RESERVED_ENV.intersection(env))
    if taken:
        raise ValueError(f"{', '.join(taken)} cannot be set by a runtime")
    return _checked(env, _ENV_NAME, "")


def _checked_labels(labels: dict[str, str]) -> dict[str, str]:
    return _checked(labels, _LABEL_KEY, _LABEL_VALUE)


def _checked_annotations(annotations: dict[str, str]) -> dict[str, str]:
    return _checked(annotations, _LABEL_KEY, "")


def _checked(entries: dict[str, str], key: str, value: str) -> dict[str, str]:
    """Return the entries. Raises ValueError for one that the API server would refuse in a pod."""
    for name, text in entries.items():
        if not re.fullmatch(key, name):
            raise ValueError(f"{name!r} is not a name that Kubernetes takes here")
        if value and not re.fullmatch(value, text):
            raise ValueError(f"the value of {name} is not one that Kubernetes takes for a label: at most 63 letters, "
                             "digits, - _ or ., beginning and ending with a letter or digit")  # fmt: skip
        if len(text) > _MAX_VALUE:
            raise ValueError(f"the value of {name} has more than {_MAX_VALUE} characters")
    return entries


def _map_schema(key: str, value: str = "", not_in: frozenset[str] = frozenset()) -> WithJsonSchema:
    names = {"pattern": key} | ({"not": {"enum": sorted(not_in)}} if not_in else {})
    values = {"type": "string"} | ({"pattern": value} if value else {"maxLength": _MAX_VALUE})
    return WithJsonSchema({"type": "object", "propertyNames": names, "additionalProperties": values})


Env = Annotated[dict[str, str], AfterValidator(_checked_env), _map_schema(_ENV_NAME, not_in=RESERVED_ENV)]
Labels = Annotated[dict[str, str], AfterValidator(_checked_labels), _map_schema(_LABEL_KEY, _LABEL_VALUE)]
Annotations = Annotated[dict[str, str], AfterValidator(_checked_annotations), _map_schema(_LABEL_KEY)]


class _Closed(BaseModel):
    """Unknown fields are errors: a misspelt value in Helm must not be ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


class Toleration(_Closed):
    key: Str256 | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: Str256 | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None


class Gpu(_Closed):
    """What is added to pods that train on a GPU."""

    resource_name: Str256 = "nvidia.com/gpu"
    node_selector: Labels = Field(default_factory=dict[str, str])
    tolerations: list[Toleration] = Field(default_factory=list[Toleration])


class TrainDefaults(_Closed):
    """The train pod, where the job does not ask for something else."""

    cpu: Cores | Cpu = "4"
    memory: Quantity = "16Gi"
    gpus_per_node: int = Field(default=0, ge=0, le=1)
    ephemeral_storage: Quantity = "20Gi"
    shared_memory: Quantity = Field(default="1Gi", description="Of /dev/shm; counts in the memory limit.")


class PrepareDefaults(_Closed):
    """The prepare pod, which never gets a GPU."""

    cpu: Cores | Cpu = "2"
    memory: Quantity = "4Gi"
    ephemeral_storage: Quantity = "20Gi"


class RequiredField(StrEnum):
    """What a policy may ask to be said of every dataset, by the name of the job's field."""

    LICENSE = "license"
    SOURCE = "source"
    CONFIDENTIALITY = "confidentiality"
    COPYRIGHT_HOLDER = "copyrightHolder"


class OutputPrefix(_Closed):
    """How confidential the data may be that is learned into adapters below a prefix of output.uri."""

    prefix: Annotated[str, StringConstraints(pattern=_PREFIX, max_length=512)] = Field(
        description="Of all beginnings of an output.uri that are listed, the longest counts; s3:// is of every one."
    )
    highest: Confidentiality


class DataPolicy(_Closed):
    """Which data jobs of a runtime may learn. It is asked once, before a job's first pod."""

    contact: Annotated[str, StringConstraints(min_length=1, max_length=256)] = Field(
        description="Whom to ask, in words that a refused user reads."
    )
    required_fields: list[RequiredField] = Field(
        default_factory=list[RequiredField], max_length=8, description="What each dataset must say."
    )
    allowed_licenses: list[Annotated[str, StringConstraints(pattern=ONE_LICENSE, max_length=128)]] = Field(
        default_factory=list[str],
        max_length=500,
        description="SPDX names that datasets may be under. Empty: any. Else a dataset that names none is refused too.",
    )
    highest_confidentiality: list[OutputPrefix] = Field(
        default_factory=list[OutputPrefix],
        max_length=100,
        description="By prefix of output.uri. Empty: any. Else other outputs are refused, and datasets that do not say "
        "how confidential they are.",
    )


class Runtime(_Closed):
    """One entry of the runtimes; a snapshot of it lies in the ConfigMap of every job that uses it."""

    image: Str256 = Field(
        description="Image of the trainer, with a tag other than latest, or a digest.",
        json_schema_extra={"pattern": _IMAGE, "not": {"pattern": ":latest$"}},
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: list[DnsSubdomain] = Field(default_factory=list[str])
    node_selector: Labels = Field(default_factory=dict[str, str])
    tolerations: list[Toleration] = Field(default_factory=list[Toleration])
    priority_class_name: DnsSubdomain | None = None
    pod_labels: Labels = Field(default_factory=dict[str, str])
    pod_annotations: Annotations = Field(default_factory=dict[str, str])
    env: Env = Field(default_factory=dict[str, str])
    node_identity: bool = Field(
        default=False, description="Whether pods without credentials of their own take the role of their node."
    )
    termination_grace_period_seconds: int = Field(default=120, ge=5, le=3600)
    gpu: Gpu = Gpu()
    defaults: TrainDefaults = TrainDefaults()
    prepare: PrepareDefaults = PrepareDefaults()
    policy: DataPolicy | None = Field(
        default=None, description="Which data its jobs may learn. It ends no job that has begun."
    )


class RuntimesFile(_Closed):
    """The file that the chart mounts into the operator."""

    runtimes: dict[DnsName, Runtime]


def runtime_of_snapshot(text: str) -> Runtime:
    """Return the runtime that a job was started with. Raises pydantic.ValidationError.

    A job that began before there was `nodeIdentity` goes on with what it had."""
    runtime = Runtime.model_validate_json(text)
    if "node_identity" in runtime.model_fields_set:
        return runtime
    return runtime.model_copy(update={"node_identity": True})
