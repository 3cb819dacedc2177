"""What the operator hands to the trainer (RunConfig) and what it gets back (RunResult, Progress).

RunConfig lies as JSON in an immutable ConfigMap. RunResult is the container's termination message. Progress is
answered by the running pod at GET /progress.

The rule across versions
------------------------
Operator and trainer may be of different releases: an operator is upgraded while jobs run, and a started job keeps
the image, the configuration and the plan that it began with.

- Readers ignore fields that they do not know, so a field **with a default** may be added at any time. Fields are never
  renamed, never given another meaning, and never lose their default.
- CONTRACT_VERSION rises when a trainer that ignores what it does not know would do something else than it was told:
  with every new field of the job or of RunConfig that the trainer has to obey.
- A trainer refuses a RunConfig of a higher number (CONTRACT_SKEW) and obeys those of lower ones.
- An operator reads results and progress of its own contract N and of N - 1; one message of each kind of contract N - 1
  is kept in tests/support/contract_*. Of a newer trainer it takes what it can: a fault that it does not know becomes
  Fault.UNRECOGNISED and the exit code decides, an activity becomes "Working", a stage makes a bad report.
- `plan.json` has a version of its own (`finetune_trainer.runplan`): a plan that this trainer cannot follow is prepared
  again while no step is finished, and ends the attempt by name afterwards.
"""

import json
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AwareDatetime, BeforeValidator, Field, StringConstraints, model_validator

from finetune_api import defaults
from finetune_api.base import Count, Seconds, Str64, Str256, Uri, WireModel
from finetune_api.job import FineTuneJobSpec, PrepareResourcesSpec, ResourcesSpec
from finetune_api.names import HTTP_PORT, SCRATCH_DIR, TERMINATION_LOG, Stage
from finetune_api.quality import Quality
from finetune_api.quantity import cpu_count, quantity_bytes
from finetune_api.reasons import Fault
from finetune_api.status import Artifact, CheckpointStatus, DataStatus, MetricsStatus, PlanStatus

CONTRACT_VERSION = 2
MAX_RESULT_BYTES = 4000  # the kubelet keeps 4096 per container
MAX_PROGRESS_BYTES = 16 * 1024
_MAX_CODE_CHARS = 64
_FAULT_CODES = frozenset(fault.value for fault in Fault)

Activity = Literal[
    "Starting", "Reading", "Loading", "Training", "Evaluating", "Saving", "Committing", "Done", "Working"
]


def _known_activity(value: object) -> object:
    """Return "Working" for a word of a newer trainer."""
    return "Working" if isinstance(value, str) and value not in get_args(Activity) else value


FaultArg = Annotated[str, StringConstraints(max_length=256)] | int | float


class JobRef(WireModel):
    """Which FineTuneJob this run belongs to.

    created_at: what `strftime_now` tells a chat template, so that every prepare of the job renders the same."""

    name: Str64
    namespace: Str64
    uid: Str64
    created_at: AwareDatetime | None = None  # None: a configuration of contract 1


class StorageConfig(WireModel):
    """How to reach object storage, with every default decided."""

    endpoint: Str256 | None = None
    region: Str64 = defaults.REGION
    path_style: bool = False
    credentials_dir: Str256 | None = None  # files named like SECRET_KEYS; None = boto3's own chain
    ca_bundle_path: Str256 | None = None


class RunResources(WireModel):
    """What one pod may use."""

    cpu_count: float = Field(gt=0)
    memory_bytes: int = Field(gt=0)
    disk_bytes: int = Field(gt=0)
    gpus: int = Field(ge=0, le=1)

    def with_asked(self, asked: ResourcesSpec | PrepareResourcesSpec | None) -> "RunResources":
        """Return these defaults with what the job asks for in their place."""
        if asked is None:
            return self
        gpus = asked.gpus_per_node if isinstance(asked, ResourcesSpec) else None
        return RunResources(
            cpu_count=self.cpu_count if asked.cpu is None else cpu_count(asked.cpu),
            memory_bytes=self.memory_bytes if asked.memory is None else quantity_bytes(asked.memory),
            disk_bytes=self.disk_bytes if asked.disk is None else quantity_bytes(asked.disk),
            gpus=self.gpus if gpus is None else gpus,
        )


class RunConfig(WireModel):
    """One job's run: the same for all stages and attempts."""

    contract_version: int
    job: JobRef
    spec: FineTuneJobSpec
    run_uri: Uri  # output.uri/NAME-UID5
    image: Str256 | None = None  # as the runtime names it: a digest says what ran, a tag only what was asked for
    storage: StorageConfig
    resources: RunResources  # of the train pod
    prepare_resources: RunResources | None = None  # None: made by an operator without resources.prepare
    work_dir: Str256 = SCRATCH_DIR
    http_port: int = HTTP_PORT  # 0 = any free port
    grace_period_s: int = Field(default=120, ge=5, le=3600)
    termination_log: Str256 = TERMINATION_LOG

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json", exclude_none=True), sort_keys=True)


class RunResult(WireModel):
    """How one stage attempt ended. Codes and arguments only: `reasons.words` turns them into sentences."""

    contract_version: int = CONTRACT_VERSION
    stage: Stage
    attempt: int = Field(ge=1)
    fault: Fault
    args: dict[Str64, FaultArg] = Field(default_factory=dict[str, str | int | float], max_length=12)
    exit_code: int = Field(ge=0, le=255)
    plan: PlanStatus | None = None
    data: DataStatus | None = None
    metrics: MetricsStatus | None = None
    checkpoint: CheckpointStatus | None = None
    artifact: Artifact | None = None
    step: Count | None = None
    resumed_from_step: Count | None = None
    log_uri: Uri | None = None
    quality: Quality | None = None

    @model_validator(mode="before")
    @classmethod
    def _recognise_fault(cls, data: Any) -> Any:
        """Replace a fault of a newer trainer by UNRECOGNISED, with its code as the argument."""
        if not isinstance(data, dict):
            return data
        fields = cast("dict[str, Any]", data)
        code = fields.get("fault")
        if not isinstance(code, str) or code in _FAULT_CODES:
            return fields
        return {**fields, "fault": Fault.UNRECOGNISED, "args": {"code": code[:_MAX_CODE_CHARS]}}

    def to_message(self) -> bytes:
        """JSON of at most MAX_RESULT_BYTES: when too long, the plan's resolved values go first, from the end."""
        result = self
        while True:
            message = json.dumps(result.model_dump(mode="json", exclude_none=True), separators=(",", ":")).encode()
            if len(message) <= MAX_RESULT_BYTES:
                return message
            if result.plan is None or not result.plan.resolved:
                raise ValueError(f"RunResult is {len(message)} bytes without resolved values")
            plan = result.plan.model_copy(update={"resolved": result.plan.resolved[:-1]})
            result = result.model_copy(update={"plan": plan})


class Progress(WireModel):
    """Where the running pod is."""

    contract_version: int = CONTRACT_VERSION
    stage: Stage
    attempt: int = Field(ge=1)
    activity: Annotated[Activity, BeforeValidator(_known_activity)]
    step: Count = 0
    total_steps: Count = 0
    step_tokens: Count = 0  # tokens of the running step that have gone through the model
    resumed_from_step: Count | None = None
    eta_seconds: float | None = Field(default=None, ge=0)
    seconds_since_step: Seconds = 0  # since anything moved: a step, a pass within it, a part of a file
    seconds_since_checkpoint: Seconds = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    base_eval_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    tokens_total: Count = 0
    rows_read: Count = 0
    checkpoint: CheckpointStatus | None = None
    quality: Quality | None = None  # None while there is nothing to say
