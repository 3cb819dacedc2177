"""The plan that prepare writes and train follows: `plan.json`, and the arrays it points to.

Everything that decides the outcome is fixed here before step 1: the base model's files, the tokens, which rows
every step reads, the learning rate of every step. Its digest is in every checkpoint.

Prepared rows of one split are three raw little-endian files, memory-mapped by readers:

- `tokens`:  uint32 (total_tokens,)   token ids of all rows, one after another
- `labels`:  uint8  (total_tokens,)   1 where the token is to be predicted from the tokens before it; never 1 at
                                      a row's first token
- `offsets`: int64  (rows + 1,)       row i is tokens[offsets[i]:offsets[i + 1]]

The batch plan is `batches.safetensors` with

- `rows`:         int64 (sum of batch sizes,)  row ids in the order they are read
- `step_offsets`: int64 (steps + 1,)           step g reads rows[step_offsets[g]:step_offsets[g + 1]]
- `label_tokens`: int64 (steps,)               label tokens of each step: the denominator of its loss
- `tokens`:       int64 (steps,)               tokens of each step

How a step's rows are packed into forward passes is not part of the plan: it changes no result but rounding.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, StringConstraints, ValidationError

from finetune_api.base import Digest, StoredModel, Str64, Str256, Uri, first_problem
from finetune_api.errors import StageError
from finetune_api.job import DatasetFormat, LossOn, MethodType, Schedule
from finetune_api.layout import PLAN, join
from finetune_api.reasons import Fault
from finetune_api.status import ResolvedValue

if TYPE_CHECKING:  # the plan itself needs no storage client
    from finetune_trainer.store import Store

PLAN_VERSION = 1
_MAX_PLAN_BYTES = 64 * 2**20
FileUri = Annotated[str, StringConstraints(max_length=8192)]  # a key has 1,024 bytes, a path 4,096, some escaped


class FileRecord(StoredModel):
    """A file in the bucket, pinned."""

    uri: FileUri
    size_bytes: int = Field(ge=0)
    etag: Str256
    sha256: Digest | None = None  # None: too large to read while planning; train fills it in the lineage


class ModelFacts(StoredModel):
    """What the base model is, read from its config.json and the headers of its weights."""

    uri: Uri
    digest: Digest  # over name, size and ETag of all files
    files: list[FileRecord] = Field(max_length=1000)
    architecture: Str256
    hidden_size: int
    layers: int
    vocabulary_size: int
    parameters: int
    context_length: int
    lora_parameters_per_rank: int  # sum of d_in + d_out over all linear layers
    target_modules: list[Str64] = Field(max_length=64)
    packing_safe: bool  # whether rows packed into one pass cannot see each other, by the family
    frequencies_change_after: int | None = None  # tokens of a row; see families.frequencies_change_after


class SplitFiles(StoredModel):
    """One split's prepared rows."""

    rows: int
    total_tokens: int
    label_tokens: int
    longest_row: int
    tokens: FileRecord
    labels: FileRecord
    offsets: FileRecord


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
    lora_rank: int
    lora_alpha: int
    eval_interval_steps: int


class SamplePrompt(StoredModel):
    """A prompt that base and tuned model answer at the end; its words are data and stay in the bucket."""

    text: str = Field(max_length=4000)
    token_ids: list[int] = Field(max_length=4096)


class RunPlan(StoredModel):
    """The whole plan; the essence of it is in `status.plan`."""

    version: Literal[1] = PLAN_VERSION
    method: MethodType
    loss_on: LossOn
    formats: list[DatasetFormat] = Field(max_length=20)
    chat_template: str | None = Field(default=None, max_length=65536)  # None: rows are plain text
    stop_token_ids: list[int] = Field(max_length=16)  # tokens that end an answer, trained in SFT
    model: ModelFacts
    hyperparameters: Hyperparameters
    train: SplitFiles
    held_out: SplitFiles | None
    batches: FileRecord
    sample_prompts: list[SamplePrompt] = Field(max_length=3)
    inputs: list[FileRecord] = Field(max_length=10_000)
    resolved: list[ResolvedValue] = Field(max_length=30)
    train_tokens: int  # over all steps
    label_tokens: int
    memory_bytes: int
    disk_bytes: int

    def digest(self) -> str:
        """SHA-256 of the canonical JSON of the plan."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def read_plan(store: "Store", run_uri: str, digest: str | None) -> RunPlan:
    """The plan that prepare wrote. Raises CONFIG_CHANGED if it is not the one this attempt was told to follow."""
    uri = join(run_uri, PLAN)
    content, _ = store.read(uri, max_bytes=_MAX_PLAN_BYTES)
    try:
        plan = RunPlan.model_validate_json(content)
    except ValidationError as error:
        field, problem = first_problem(error)
        raise StageError(Fault.CONFIG_UNREADABLE, field=f"plan.json {field}"[:256], problem=problem[:256]) from error
    found = plan.digest()
    if digest is not None and found != digest:
        raise StageError(Fault.CONFIG_CHANGED, what="the plan", step=0, found=found, expected=digest)
    return plan
