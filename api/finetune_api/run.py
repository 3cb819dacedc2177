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
  Fault.UNRECOGNISED and the exit code decides, an activity becomes "Working", a concern about the model is left out, a
  stage makes a bad report.
- `plan.json` has a version of its own (`finetune_trainer.runplan`): a plan that this trainer cannot follow is prepared
  again while no step is finished, and ends the attempt by name afterwards.
"""

import copy
import json
from collections.abc import Iterator
from os.path import commonprefix
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AwareDatetime, BeforeValidator, Field, StringConstraints, model_validator

from finetune_api import defaults
from finetune_api.base import Count, Digest, Seconds, Str64, Str256, Uri, WireModel
from finetune_api.job import FineTuneJobSpec, PrepareResourcesSpec, ResourcesSpec
from finetune_api.names import HTTP_PORT, SCRATCH_DIR, TERMINATION_LOG, Stage
from finetune_api.quality import FIGURE_WORDS, Concern, Quality
from finetune_api.quantity import cpu_count, quantity_bytes
from finetune_api.reasons import Fault
from finetune_api.status import Artifact, CheckpointStatus, DataStatus, DroppedRows, MetricsStatus, PlanStatus

CONTRACT_VERSION = 2
MAX_RESULT_BYTES = 4000  # the kubelet keeps 4096 per container
MAX_PROGRESS_BYTES = 16 * 1024
_MAX_CODE_CHARS = 64
_URI_BASE = "uri_base"  # in a message whose URIs had to be shortened: what they begin with
_URIS = (
    ("plan", "uri"),
    ("data", "reportUri"),
    ("data", "reportPageUri"),
    ("checkpoint", "uri"),
    ("artifact", "uri"),
    ("artifact", "manifestUri"),
    ("log_uri",),
)
_FAULT_CODES = frozenset(fault.value for fault in Fault)

Activity = Literal[
    "Starting", "Reading", "Loading", "Scoring", "Training", "Evaluating", "Saving", "Committing", "Done", "Working"
]


def _known_activity(value: object) -> object:
    """Return "Working" for a word of a newer trainer."""
    return "Working" if isinstance(value, str) and value not in get_args(Activity) else value


MAX_ARG_CHARS = 256
MAX_ARGS = 12  # of one fault

FaultArg = Annotated[str, StringConstraints(max_length=MAX_ARG_CHARS)] | int | float


def _with_known_fault(data: Any) -> Any:
    """Replace a fault of a newer trainer by UNRECOGNISED, with its code as the argument."""
    if not isinstance(data, dict):
        return data
    fields = cast("dict[str, Any]", data)
    code = fields.get("fault")
    if not isinstance(code, str) or code in _FAULT_CODES:
        return fields
    return {**fields, "fault": Fault.UNRECOGNISED, "args": {"code": code[:_MAX_CODE_CHARS]}}


def _with_known_concerns(quality: object) -> object:
    """Leave out the concerns of a newer trainer; None where no other is left, as none would be said to exist."""
    if not isinstance(quality, dict):
        return quality
    fields = cast("dict[str, Any]", quality)
    told = fields.get("concerns", [])
    known = [each for each in cast("list[Any]", told) if each in get_args(Concern)] if isinstance(told, list) else []
    return {**fields, "concerns": known} if known or told == [] else None


KnownQuality = Annotated[Quality | None, BeforeValidator(_with_known_concerns)]


def _known_figures(figures: object) -> object:
    """Leave out the figures of a newer trainer, and those that are no number."""
    if not isinstance(figures, dict):
        return figures
    told = cast("dict[str, Any]", figures)
    return {name: told[name] for name in FIGURE_WORDS if isinstance(told.get(name), int | float)}


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


class StartingAdapter(WireModel):
    """The committed adapter that training goes on with. digest: of its manifest; None: whatever lies there is meant."""

    uri: Uri
    digest: Digest | None = None


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
    starting_adapter: StartingAdapter | None = None  # of model.adapterFrom; None: training begins with a new one
    image: Str256 | None = None  # as the runtime names it: a digest says what ran, a tag only what was asked for
    storage: StorageConfig
    resources: RunResources  # of the train pod
    prepare_resources: RunResources | None = None  # None: made by an operator without resources.prepare
    pii_key_path: Str256 | None = None  # of a file, for prepare; None: nothing is pseudonymised
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
    args: dict[Str64, FaultArg] = Field(default_factory=dict[str, str | int | float], max_length=MAX_ARGS)
    exit_code: int = Field(ge=0, le=255)
    plan: PlanStatus | None = None
    data: DataStatus | None = None
    metrics: MetricsStatus | None = None
    checkpoint: CheckpointStatus | None = None
    artifact: Artifact | None = None
    step: Count | None = None
    resumed_from_step: Count | None = None
    log_uri: Uri | None = None
    quality: KnownQuality = None

    @model_validator(mode="before")
    @classmethod
    def _read_message(cls, data: Any) -> Any:
        return _with_known_fault(_with_whole_uris(data))

    def to_message(self) -> bytes:
        """Return JSON of at most MAX_RESULT_BYTES as written; never raises.

        When it is too long, URIs lose what they have in common, which readers put back. Then goes what can be found
        elsewhere: the plan's resolved values from the end, the place of the log, the last checkpoint, figures, the ends
        of arguments. What the operator decides by goes last.
        """
        for result in self._ever_shorter():
            message = _encoded(result.model_dump(mode="json", exclude_none=True))
            if len(message) <= MAX_RESULT_BYTES:
                return message
        bare = self.model_dump(mode="json", include={"contract_version", "stage", "attempt", "fault", "exit_code"})
        return _encoded(bare)

    def _ever_shorter(self) -> Iterator["RunResult"]:
        """Yield the result with less and less in it."""
        result = self
        yield result
        while result.plan is not None and result.plan.resolved:
            plan = result.plan.model_copy(update={"resolved": result.plan.resolved[:-1]})
            result = result.model_copy(update={"plan": plan})
            yield result
        for field in ("log_uri", "checkpoint", "metrics"):
            result = result.model_copy(update={field: None})
            yield result
        for size_bytes in (64, 16):
            args = {name: _cut(value, size_bytes) for name, value in result.args.items()}
            result = result.model_copy(update={"args": args})
            yield result
        if result.data is not None and result.data.dropped:
            rows = DroppedRows(reason="other", rows=sum(drop.rows for drop in result.data.dropped))
            result = result.model_copy(update={"data": result.data.model_copy(update={"dropped": [rows]})})
        yield result.model_copy(update={"args": {}})


def _uri_places(fields: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return the URIs of a message as (object, name): all lie below the run's folder."""
    found: list[tuple[dict[str, Any], str]] = []
    for *parents, name in _URIS:
        place: Any = fields
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(cast("dict[str, Any]", place).get(name), str):
            found.append((cast("dict[str, Any]", place), name))
    return found


def _encoded(fields: dict[str, Any]) -> bytes:
    """Return the message as bytes; where it is too long, with the beginning that its URIs share said once."""
    plain = _json_bytes(fields)
    places = _uri_places(fields)
    if len(plain) <= MAX_RESULT_BYTES or not places:
        return plain
    base = commonprefix([place[name] for place, name in places])  # noqa: RUF071 (letters are meant, not folders)
    for place, name in places:
        place[name] = place[name][len(base) :]
    return _json_bytes({_URI_BASE: base, **fields})


def _with_whole_uris(data: Any) -> Any:
    """Undo the shortening of `_encoded`."""
    if not isinstance(data, dict) or not isinstance(base := cast("dict[str, Any]", data).get(_URI_BASE), str):
        return cast("Any", data)
    fields = cast("dict[str, Any]", copy.deepcopy(data))
    del fields[_URI_BASE]
    for place, name in _uri_places(fields):
        place[name] = base + place[name]
    return fields


def _json_bytes(fields: dict[str, Any]) -> bytes:
    """Non-ASCII characters as themselves: escaped, they would need up to three times the room."""
    return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode(errors="replace")


def _cut(value: FaultArg, size_bytes: int) -> FaultArg:
    """Return a text's beginning within so many bytes; numbers as they are."""
    if not isinstance(value, str) or len(value.encode(errors="replace")) <= size_bytes:
        return value
    return value.encode(errors="replace")[:size_bytes].decode(errors="ignore") + "…"


class Trouble(WireModel):
    """What fails at present and is tried again while the stage goes on, such as the save of a checkpoint."""

    fault: Fault
    args: dict[Str64, FaultArg] = Field(default_factory=dict[str, str | int | float], max_length=MAX_ARGS)
    since: float = Field(ge=0, le=1e10)  # Unix time of the first try that failed

    @model_validator(mode="before")
    @classmethod
    def _recognise_fault(cls, data: Any) -> Any:
        return _with_known_fault(data)


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
    answers_to_score: Count = 0  # by the model that the job began with, before the first step
    answers_scored: Count = 0
    tokens_per_second: float | None = None
    tokens_total: Count = 0
    rows_read: Count = 0
    bytes_read: Count = 0  # of the data files, as they lie in the bucket
    bytes_total: Count = 0
    rows_per_second: float | None = None  # while they are read
    checkpoint: CheckpointStatus | None = None
    figures: Annotated[dict[Str64, float], BeforeValidator(_known_figures)] = Field(
        default_factory=dict[str, float]
    )  # what the method measures beside the loss, in the last step
    quality: KnownQuality = None  # None while there is nothing to say
    trouble: Trouble | None = None

    @property
    def percentage(self) -> int:
        """How far the stage is: with the data's bytes in prepare, with the steps in train. 0 while it is not known."""
        of_data = self.stage is Stage.PREPARE
        done, total = (self.bytes_read, self.bytes_total) if of_data else (self.step, self.total_steps)
        return min(100, 100 * done // total) if total else 0
