"""The plan that prepare writes and train follows: `plan.json`, and the arrays it points to.

Everything that decides the outcome is fixed here before step 1: the base model's files, the tokens, which rows
every step reads, the learning rate of every step. Its digest is in every checkpoint.

Prepared examples of one split are raw little-endian arrays, one file each, memory-mapped by readers; their names,
types and meaning stand in `data.examples`. A row is one example; one that is split because it is too long is as many
as it has pieces, so that no step has to read a whole book.

The batch plan is `batches.safetensors` with

- `examples`:     int64 (sum of batch sizes,)  examples in the order they are read
- `step_offsets`: int64 (steps + 1,)           step g reads examples[step_offsets[g]:step_offsets[g + 1]]
- `label_tokens`: int64 (steps,)               label tokens of each step
- `denominators`: float64 (steps,)             what the sum of each step's losses is divided by: see Denominator
- `tokens`:       int64 (steps,)               tokens of each step, as flat sequences

How a step's sequences are packed into forward passes is not part of the plan: it changes no result but rounding.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field, StringConstraints, ValidationError, model_validator

from finetune_api.base import Digest, StoredModel, Str64, Str256, Uri, first_problem, sha256_digest
from finetune_api.errors import StageError
from finetune_api.governance import Confidentiality
from finetune_api.job import AdapterMode, DatasetFormat, LossOn, MethodSpec, MethodType, Schedule
from finetune_api.layout import PLAN, PLANS, join
from finetune_api.quality import Unit
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_api.status import ResolvedValue
from finetune_trainer.data.examples import ARRAYS
from finetune_trainer.origins import MAX_EARLIER, DataOrigin, highest

if TYPE_CHECKING:  # the plan itself needs no storage client
    from finetune_trainer.store import Store

PLAN_VERSION = 3  # rises with every change after which an older plan means something else, or lacks something
ANSWERS_FIELD = "answers."  # begins the names of values that say how answers were taught
FIRST_TO_CHANGE = (
    "hyperparameters.epochs",
    "hyperparameters.learningRate",
    "hyperparameters.globalBatchSize",
    "preprocessing.maxSequenceLength",
    "preprocessing.tooLong",
    "preprocessing.maxTooLongFraction",
    "peft.rank",
    "method.sft.lossOn",
    "method.dpo.loss",
    "method.dpo.beta",
    "method.dpo.gamma",
    "method.orpo.lambda",
    "method.kto.beta",
    "method.kto.desirableWeight",
    "method.kto.undesirableWeight",
    "evaluation.holdoutFraction",
    "preprocessing.deduplication.exact",
    "preprocessing.deduplication.near",
    "preprocessing.onBadRow",
    "preprocessing.maxBrokenFraction",
    "datasets[].format",
    "preprocessing.packing",
    "peft.alpha",
    "hyperparameters.schedule",
    "hyperparameters.warmupRatio",
    "hyperparameters.weightDecay",
    "hyperparameters.seed",
    "peft.type",
)
MAX_MODULES = 64  # kinds of linear layers
MAX_ALPHA = 65536  # of an adapter; its rank is bounded by what is served
# What --max-lora-rank of vLLM accepts, by which an adapter of more than the last is served by nobody.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_MAX_PLAN_BYTES = 64 * 2**20
FileUri = Annotated[str, StringConstraints(max_length=8192)]  # a key has 1,024 bytes, a path 4,096, some escaped


class FileRecord(StoredModel):
    """A file in the bucket, and what tells its content from another: see `finetune_trainer.identity`."""

    uri: FileUri
    size_bytes: int = Field(ge=0)
    sha256: Digest | None = None  # None: too large to read while planning; train fills it in the lineage
    sample: Digest | None = None  # of a file that was not read whole
    checksum: Str256 | None = None  # the store's own, of a file that was not read whole
    etag: Str256 | None = None  # of a version, not of a content: no part of the plan's digest


class LayerWidths(StoredModel):
    """Widths of one layer, which the memory of a pass is counted in."""

    query: int  # query heads times the size of a head
    key: int  # key heads times the size of a head
    mlp: int  # inside the MLP; of a mixture, all experts that one token passes through
    window: int | None  # tokens that a windowed layer sees; None: all layers see the whole row
    windowed_layers: int


class ModelFacts(StoredModel):
    """What the base model is, read from its config.json and the headers of its weights."""

    uri: Uri
    digest: Digest  # over name, size and content of all files, as far as prepare reads them
    files: list[FileRecord] = Field(max_length=1000)
    architecture: Str256
    hidden_size: int
    layers: int
    vocabulary_size: int
    parameters: int
    context_length: int
    expert_parameters: int = 0  # in the experts of a mixture, which get no adapter
    lora_parameters_per_rank: int  # sum of d_in + d_out over all linear layers
    target_modules: list[Str64] = Field(max_length=MAX_MODULES)
    packing_safe: bool  # whether rows packed into one pass cannot see each other, by the family
    widths: LayerWidths
    frequencies_change_after: int | None = None  # tokens of a row; see families.frequencies_change_after


class AdapterFacts(StoredModel):
    """The adapter that training goes on with, as its job committed it.

    rslora: it is scaled by its alpha over the square root of its rank."""

    uri: Uri
    digest: Digest  # of its manifest
    weights: FileRecord
    base_files: dict[Str256, Digest] = Field(max_length=1000)  # that decide what the base model computes
    rank: int
    alpha: int
    rslora: bool = False
    target_modules: list[Str64] = Field(default=[], max_length=MAX_MODULES)  # []: of a release that kept none
    mode: AdapterMode = AdapterMode.CONTINUE
    data: list[DataOrigin] = Field(default=[], max_length=MAX_EARLIER)  # that it has learned, as far as that is said

    @property
    def scale(self) -> float:
        """What the product of its matrices is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Denominator(StrEnum):
    """The units that the losses of a step are of; their sum is divided by that of the units, each times its weight.

    LABEL_TOKENS: the label tokens of the step's examples. EXAMPLES: the examples, each of which is in one pass."""

    LABEL_TOKENS = "label_tokens"
    EXAMPLES = "examples"

    @property
    def unit(self) -> Unit:
        """What one of them is called beside a loss."""
        return "token" if self is Denominator.LABEL_TOKENS else "example"

    @property
    def keeps_examples_whole(self) -> bool:
        """Whether all flat sequences of an example have to be in one pass, as its loss is one of them together."""
        return self is Denominator.EXAMPLES

    def units(self, label_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return how many units each example is, by its label tokens; or each flat sequence, if not kept whole."""
        return label_tokens if self is Denominator.LABEL_TOKENS else np.ones_like(label_tokens)


class PassLayout(StrEnum):
    """How the flat sequences of some examples go through the model."""

    APART = "apart"  # each alone
    PACKED = "packed"  # several in a pass, one behind another
    TREES = "trees"  # the same, and what those of one example share is computed once


class SplitFiles(StoredModel):
    """One split's prepared examples. arrays: by name, those of `data.examples`."""

    examples: int
    segments: int
    sequences: int  # flat ones, that the examples are read as
    stored_tokens: int  # of all segments: what sequences share is counted once
    total_tokens: int  # of all flat sequences: what they share is counted in each
    label_tokens: int
    longest_row: int  # tokens of the longest flat sequence
    arrays: dict[Str64, FileRecord] = Field(max_length=32)

    @model_validator(mode="after")
    def _holds_all_arrays(self) -> Self:
        if missing := ARRAYS.keys() - self.arrays.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return self


class Hyperparameters(StoredModel):
    """Every number of the loop, decided."""

    learning_rate: float
    warmup_steps: int
    schedule: Schedule
    weight_decay: float
    max_grad_norm: float
    seed: int
    total_steps: int
    global_batch_size: int
    max_sequence_length: int
    micro_batch_tokens: int  # token budget of one forward pass
    packing: bool
    trees: bool = False  # whether what flat sequences of an example share is computed once; only with packing
    lora_rank: int
    lora_alpha: int
    eval_interval_steps: int

    @property
    def layout(self) -> PassLayout:
        """How flat sequences go through the model."""
        if not self.packing:
            return PassLayout.APART
        return PassLayout.TREES if self.trees else PassLayout.PACKED


class FileRange(StoredModel):
    """Neighbouring files of the data, by their places among all; the end is behind the last."""

    first: int = Field(ge=0)
    end: int = Field(ge=0)


class SamplePrompt(StoredModel):
    """A prompt that base and tuned model answer at the end; its words are data and stay in the bucket."""

    text: str = Field(max_length=4000)
    token_ids: list[int] = Field(max_length=4096)


class RunPlan(StoredModel):
    """The whole plan; the essence of it is in `status.plan`."""

    version: Literal[3] = PLAN_VERSION
    method: MethodType
    options: MethodSpec | None = None  # of the method, every one chosen; None: of a release before they were kept
    loss_on: LossOn
    formats: list[DatasetFormat] = Field(max_length=20)
    chat_template: str | None = Field(default=None, max_length=65536)  # None: rows are plain text
    stop_token_ids: list[int] = Field(max_length=16)  # trained ends: of an answer (SFT), of a text (CPT)
    stop_tokens: list[Str64] = Field(default=[], max_length=16)  # the same as text
    same_ids: Str256 | None = None  # on how many rows ids are those of transformers; None where none is a conversation
    model: ModelFacts
    starting_adapter: AdapterFacts | None = None  # None: training begins with a new one
    hyperparameters: Hyperparameters
    train: SplitFiles
    held_out: SplitFiles | None
    denominator: Denominator = Denominator.LABEL_TOKENS
    batches: FileRecord
    sample_prompts: list[SamplePrompt] = Field(max_length=3)
    inputs: list[FileRecord] = Field(max_length=10_000)
    data: list[DataOrigin] = Field(default=[], max_length=20)  # the datasets, in order
    replayed: list[FileRange] = Field(default=[], max_length=20)  # files whose rows are mixed in against forgetting
    resolved: list[ResolvedValue] = Field(max_length=200)  # in the order of `first_to_change`
    train_tokens: int  # over all steps, of flat sequences
    # Over all steps, with what flat sequences share counted once where it is computed once; None: of a release before.
    computed_tokens: int | None = None
    label_tokens: int
    memory_bytes: int
    gpu_memory_bytes: int | None  # None: trains on the CPU
    disk_bytes: int

    @property
    def stacked_on(self) -> AdapterFacts | None:
        """The adapter that is kept as it is beside the one that is trained; None where there is none."""
        adapter = self.starting_adapter
        return adapter if adapter is not None and adapter.mode is AdapterMode.STACK else None

    @property
    def earlier_data(self) -> list[DataOrigin]:
        """What the adapter had learned that training went on with."""
        return self.starting_adapter.data if self.starting_adapter is not None else []

    @property
    def confidentiality(self) -> Confidentiality | None:
        """How confidential what learned all of its data is; None where that is not said of some of it."""
        adapter = self.starting_adapter
        is_unknown = adapter is not None and not adapter.data  # of a release that said nothing of data
        return None if is_unknown else highest([*self.data, *self.earlier_data])

    @property
    def exported_rank(self) -> int:
        """The rank of the adapter that is committed."""
        return self.hyperparameters.lora_rank + (self.stacked_on.rank if self.stacked_on is not None else 0)

    def digest(self) -> str:
        """Return the plan's digest: equal for equal plans, whenever and how often the same inputs were written."""
        return plan_digest(self.model_dump(mode="json"))


def plan_digest(content: object) -> str:
    """SHA-256 of a plan's canonical JSON without ETags."""
    canonical = json.dumps(_without_etags(content), sort_keys=True, separators=(",", ":"))
    return sha256_digest(canonical.encode())


def _without_etags(content: Any) -> Any:
    if isinstance(content, list):
        return [_without_etags(item) for item in cast("list[Any]", content)]
    if isinstance(content, dict):
        fields = cast("dict[str, Any]", content)
        return {name: _without_etags(value) for name, value in fields.items() if name != "etag"}
    return content


def plan_uri(run_uri: str, digest: str) -> str:
    """Where the plan of this digest lies."""
    return join(run_uri, PLANS, f"{digest.removeprefix('sha256:')}.json")


@dataclass(frozen=True)
class StoredPlan:
    """A plan as it was read, and its digest."""

    plan: RunPlan
    digest: str


def read_plan(store: "Store", run_uri: str, digest: str | None) -> StoredPlan:
    """Read the plan of this digest, or the last one that was written.

    Raises PLAN_OUTDATED for one that another release of the trainer wrote, CONFIG_CHANGED if its content is not what
    the digest says, OBJECT_NOT_FOUND.
    """
    content = _plan_bytes(store, run_uri, digest)
    try:
        found: Any = json.loads(content)
    except ValueError as error:
        raise StageError(Fault.CONFIG_UNREADABLE, field="plan.json", problem="not JSON") from error
    version = cast("dict[str, Any]", found).get("version") if isinstance(found, dict) else None
    if version != PLAN_VERSION:
        raise StageError(Fault.PLAN_OUTDATED, found=shortened(str(version), 20), expected=PLAN_VERSION)
    stored_digest = plan_digest(found)
    if digest is not None and stored_digest != digest:
        raise StageError(Fault.CONFIG_CHANGED, what="the plan", step=0, found=stored_digest, expected=digest)
    try:
        return StoredPlan(RunPlan.model_validate(found), stored_digest)
    except ValidationError as error:  # it is what prepare wrote, so a trainer of another release wrote it
        field, _problem = first_problem(error)
        version = shortened(f"{PLAN_VERSION} with another {field}", 256)
        raise StageError(Fault.PLAN_OUTDATED, found=version, expected=PLAN_VERSION) from error


def _plan_bytes(store: "Store", run_uri: str, digest: str | None) -> bytes:
    if digest is not None:
        try:
            return store.read(plan_uri(run_uri, digest), max_bytes=_MAX_PLAN_BYTES)[0]
        except StageError as error:
            if error.fault is not Fault.OBJECT_NOT_FOUND:
                raise
    return store.read(join(run_uri, PLAN), max_bytes=_MAX_PLAN_BYTES)[0]  # also that of a release before


def first_to_change(values: Iterable[ResolvedValue]) -> list[ResolvedValue]:
    """Order chosen values: first those that people change first. The status has room for the beginning."""
    places = {field: place for place, field in enumerate(FIRST_TO_CHANGE)}
    return sorted(values, key=lambda value: places.get(value.field, len(places)))
