"""Every value the spec left open, chosen from what the model and the data are, with the reason. Pure.

The rules, with their constants in `finetune_api.defaults`: LoRA on all linear layers, rank by the number of tokens to
learn and learning rate by family and width (Thinking Machines, "LoRA Without Regret", 2025), small batches because
LoRA pays for large ones at any rank.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TypeVar

from finetune_api import defaults
from finetune_api.errors import StageError
from finetune_api.job import AdapterMode, FineTuneJobSpec, HyperparametersSpec, PreprocessingSpec, TooLong
from finetune_api.reasons import Fault
from finetune_api.run import RunResources
from finetune_api.status import ResolvedValue
from finetune_trainer.batches import rows_to_read
from finetune_trainer.data.examples import REFERENCE_VALUE
from finetune_trainer.data.too_long import ASSUMED_GPU_GIB, LimitSource, SequenceLimit
from finetune_trainer.memory import adapter_bytes, kept_bytes, pass_bytes
from finetune_trainer.methods import method_of
from finetune_trainer.methods.method import Method
from finetune_trainer.runplan import SERVED_RANKS, AdapterFacts, Hyperparameters, ModelFacts
from finetune_trainer.speed import slow_tokens_per_second
from finetune_trainer.step_plan import READ_BYTES, STEP_BYTES
from finetune_trainer.trees import computes_trees

T = TypeVar("T")
GIB = 2**30
_CPU_MICRO_BATCH_TOKENS = 2048
_GPU_MICRO_BATCH_TOKENS = 8192
_LEAST_LIMIT = 2048  # tokens of a sequence that are never too many by default, whatever memory there is
_MAX_PLANNED_ROWS = 500_000_000  # on disk; what is in memory is bounded by the examples: see batches
_MAX_BATCH_TOKENS = 65536
_PROCESS_BYTES = GIB  # torch and transformers: 0.7 GiB measured, and allocator slack
# Steps of different lengths leave the heap in more pieces than the bench's: 1,110 MiB were held at SmolLM2's widths,
# where 536 are kept and 76 more in use (6 layers, 6 steps of 1 to 20 rows).
_UNEVEN_STEPS_SHARE = 0.75
_CUDA_HOST_BYTES = 2 * GIB  # the driver's and CUDA libraries' share of host memory
_CUDA_BYTES = 3 * GIB // 2  # on the GPU: context, cuBLAS workspaces, blocks that the allocator cannot use
_EVAL_SHARE = 0.1  # of the time that the steps take, for measuring held-out rows between them
_MAX_EVALUATIONS = 9  # between the steps
_DEADLINE_SHARE = 0.25  # of recovery.progressDeadlineSeconds that a planned step may take on a slow machine
_CLEARLY = 1.1  # an estimate is refused only when it is above the limit by more than its own error


@dataclass(frozen=True)
class DataFacts:
    """What the prepared training rows are."""

    rows: int
    epoch_rows: float  # that one epoch reads: each row as often as the weight of its dataset says
    distinct_rows: int  # by content
    tokens: int
    label_tokens: int
    longest_row: int  # tokens of the longest flat sequence, of the training rows
    longest_of_all: int  # held-out rows included, which are packed as well
    largest_row: int  # tokens of all flat sequences of one training row
    stored_tokens: int  # with what the flat sequences of an example share counted once
    largest_tree: int  # of them, in one training row
    most_repeated: float  # tokens of an example's flat sequences for each that it stores, at most
    measured_tokens: int  # of the held-out rows that are measured
    prepared_bytes: int
    segments: int  # of all examples, held-out ones included
    too_long_rows: int
    limit: SequenceLimit  # that rows were dropped or split at


@dataclass(frozen=True)
class Sizing:
    """What was chosen."""

    hyperparameters: Hyperparameters
    total_rows: int  # rows read over all steps
    memory_bytes: int
    gpu_memory_bytes: int | None  # None: trains on the CPU
    disk_bytes: int
    resolved: list[ResolvedValue]


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What is trained on what: all that the memory and disk of a run depend on, beside the tokens of its passes."""

    model: ModelFacts
    family: str
    data: DataFacts
    rank: int
    kept_rank: int
    resources: RunResources

    def memory_bytes(self, tokens: int, *, trees: bool) -> int:
        """Return the bytes of host memory that passes of so many tokens need. Of trees a pass keeps a copy of what
        attention sees, of as many tokens as flat sequences would have, at most."""
        copied = round(tokens * self.data.most_repeated) if trees else 0
        longest, gpus = self.data.longest_row, self.resources.gpus
        return memory_estimate(self.model, self.family, self.rank, tokens, longest, gpus, copied, self.kept_rank)


@dataclass(frozen=True)
class _Pace:
    """How much a slow machine of this kind does, and in what time something has to be done."""

    tokens_per_s: float
    deadline_s: int
    machine: str

    @property
    def step_tokens(self) -> int:
        """Tokens of a step that stays well within the deadline."""
        return int(self.tokens_per_s * self.deadline_s * _DEADLINE_SHARE)


class Choices:
    """Collects the values that the spec left open."""

    def __init__(self) -> None:
        self.resolved: list[ResolvedValue] = []

    def pick(self, field: str, given: T | None, value: T, reason: str) -> T:
        """`given`, or else `value`, which is then recorded with its reason."""
        if given is not None:
            return given
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        shown = shown.lower() if isinstance(value, bool) else shown
        self.resolved.append(ResolvedValue(field=field, value=shown, reason=reason[:160]))
        return value

    def note(self, field: str, value: object, reason: str) -> None:
        """Record what follows from the job as it is written, and may surprise whoever wrote it."""
        self.resolved.append(ResolvedValue(field=field, value=str(value)[:64], reason=reason[:160]))


def sequence_limit(
    spec: FineTuneJobSpec,
    model: ModelFacts,
    family: str,
    resources: RunResources,
    starting_adapter: AdapterFacts | None = None,
) -> SequenceLimit:
    """Return how long a sequence may be: as the spec says, or as the model was made for and the memory allows.

    What the memory allows is counted for one row in a pass, or all sequences of one example, and the largest rank that
    may be chosen; below _LEAST_LIMIT the job is rather refused. The memory of a GPU is not known here, so
    ASSUMED_GPU_GIB is taken for it. Raises SEQUENCE_LENGTH_TOO_LONG when the spec asks for more than the model was
    made for.
    """
    asked = spec.preprocessing.max_sequence_length if spec.preprocessing else None
    if asked is not None:
        if asked > model.context_length:
            limit = model.context_length
            raise StageError(Fault.SEQUENCE_LENGTH_TOO_LONG, asked=asked, uri=model.uri[-256:], limit=limit)
        return SequenceLimit(asked, LimitSource.ASKED)
    method = method_of(spec.method.type)
    limit = SequenceLimit(model.context_length, LimitSource.CONTEXT)
    if method.longest_tokens is not None and limit.tokens > method.longest_tokens:
        limit = SequenceLimit(method.longest_tokens, LimitSource.TEXTS)
    rank, kept_rank = (spec.peft and spec.peft.rank) or method.ranks[-1], _kept_rank(starting_adapter)
    if starting_adapter is not None and not kept_rank:
        rank = starting_adapter.rank

    def fits(tokens: int) -> bool:
        together = method.sequences * tokens
        if resources.gpus:
            return gpu_memory_estimate(model, family, rank, together, tokens, kept_rank) <= ASSUMED_GPU_GIB * GIB
        needed = memory_estimate(model, family, rank, together, tokens, gpus=0, kept_rank=kept_rank)
        return needed <= resources.memory_bytes

    if fits(limit.tokens):
        return limit
    most = bisect_left(range(limit.tokens), True, key=lambda tokens: not fits(tokens + 1))
    source = LimitSource.GPU if resources.gpus else LimitSource.MEMORY
    return SequenceLimit(min(limit.tokens, max(_LEAST_LIMIT, most)), source)


def size(
    spec: FineTuneJobSpec,
    model: ModelFacts,
    family: str,
    data: DataFacts,
    resources: RunResources,
    starting_adapter: AdapterFacts | None = None,
) -> Sizing:
    """Decide every number of the run. `family` is the model_type of config.json.

    Raises MEMORY_TOO_SMALL or DISK_TOO_SMALL when what is granted clearly does not suffice, CONFIG_UNREADABLE for
    packing that would mix up rows.
    """
    choices = Choices()
    method = method_of(spec.method.type)
    preprocessing = spec.preprocessing or PreprocessingSpec()
    hyper = spec.hyperparameters or HyperparametersSpec()
    length = _sequence_length(choices, preprocessing, data, method)
    epochs = _epochs(choices, hyper, data.epoch_rows, method)
    rank, alpha = _adapter(choices, spec, model, _most_learned(hyper, data), starting_adapter)
    kept_rank = _kept_rank(starting_adapter)
    pace = _Pace(
        tokens_per_s=slow_tokens_per_second(model, rank + kept_rank, max(1, data.tokens // data.rows), resources),
        deadline_s=defaults.given(
            spec.recovery and spec.recovery.progress_deadline_seconds, defaults.PROGRESS_DEADLINE_S
        ),
        machine="this GPU" if resources.gpus else f"{resources.cpu_count:g} CPUs",
    )
    packing = _packing(choices, preprocessing, model, family, data)
    training = _Training(model=model, family=family, data=data, rank=rank, kept_rank=kept_rank, resources=resources)
    trees = _trees(choices, training, pace, method, packing=packing)
    batch = _batch_size(choices, hyper, data, epochs, pace, trees=trees)
    if hyper.max_steps is not None:
        total_rows, steps = hyper.max_steps * batch, hyper.max_steps
    else:
        total_rows = rows_to_read(data.epoch_rows, epochs)
        steps = -(-total_rows // batch)
    if model.expert_parameters:
        text = f"experts are not adapted: {model.expert_parameters:,} of {model.parameters:,} weights"
        choices.note(
            "targetModules", ", ".join(model.target_modules), f"the linear layers that PEFT adapts beside them; {text}"
        )
    if hyper.max_steps is not None and total_rows < data.rows:
        text = f"as written: the steps read {total_rows:,} of {data.rows:,} rows"
        choices.note("hyperparameters.maxSteps", hyper.max_steps, text)
    if total_rows > _MAX_PLANNED_ROWS:
        field = "spec.hyperparameters.maxSteps" if hyper.max_steps else "spec.hyperparameters.epochs"
        problem = f"{total_rows:,} rows would be read in all; at most {_MAX_PLANNED_ROWS:,} are planned, so write less"
        raise StageError(Fault.CONFIG_UNREADABLE, field=field, problem=problem)
    learning_rate = _learning_rate(choices, hyper, model, family, steps, method)
    warmup_ratio = choices.pick(
        "hyperparameters.warmupRatio", hyper.warmup_ratio, defaults.WARMUP_RATIO, "usual for LoRA"
    )
    schedule = choices.pick("hyperparameters.schedule", hyper.schedule, *method.schedule)
    weight_decay = choices.pick(
        "hyperparameters.weightDecay", hyper.weight_decay, defaults.WEIGHT_DECAY, "LoRA needs none"
    )
    seed = choices.pick("hyperparameters.seed", hyper.seed, defaults.SEED, "fixed, so that a rerun repeats the order")
    micro, memory = _micro_batch(choices, training, batch, pace, method, trees=trees)
    if not resources.gpus:
        reason = "bf16 where the node that trains finds it clearly faster, and the first step's loss agrees"
        choices.note("precision", "fp32, or bf16 if faster", reason)
    gpu_memory = _gpu_memory(choices, training, micro) if resources.gpus else None
    disk = _disk_bytes(training, READ_BYTES * total_rows + STEP_BYTES * steps)
    disk += _reference_bytes(method.bound(method, spec.method), data.segments)
    if disk > resources.disk_bytes * _CLEARLY:
        raise StageError(
            Fault.DISK_TOO_SMALL,
            needed_gib=round(disk / GIB, 1),
            limit_gib=round(resources.disk_bytes / GIB, 1),
        )
    return Sizing(
        hyperparameters=Hyperparameters(
            learning_rate=learning_rate,
            warmup_steps=math.ceil(warmup_ratio * steps),
            schedule=schedule,
            weight_decay=weight_decay,
            max_grad_norm=1.0,
            seed=seed,
            total_steps=steps,
            global_batch_size=batch,
            max_sequence_length=length,
            micro_batch_tokens=micro,
            packing=packing,
            trees=trees,
            lora_rank=rank,
            lora_alpha=alpha,
            eval_interval_steps=_eval_interval_steps(steps, total_rows * data.tokens // data.rows, data),
        ),
        total_rows=total_rows,
        memory_bytes=memory,
        gpu_memory_bytes=gpu_memory,
        disk_bytes=disk,
        resolved=choices.resolved,
    )


def _eval_interval_steps(steps: int, trained_tokens: int, data: DataFacts) -> int:
    """Return after how many steps the held-out rows are measured again, besides before the first and after the last.

    A forward pass is half of a LoRA step's work per token (see flops.py), so that all of them take a tenth of the
    steps' time, and are _MAX_EVALUATIONS at most.
    """
    affordable = int(_EVAL_SHARE * 2 * trained_tokens) // max(1, data.measured_tokens)
    return -(-steps // (1 + min(_MAX_EVALUATIONS, affordable)))


def _most_learned(spec: HyperparametersSpec, data: DataFacts) -> int:
    """Return the number of different tokens that can be learned from, in at most one pass over the data."""
    if spec.max_steps is not None:
        rows = spec.max_steps * (spec.global_batch_size or defaults.BATCH_SIZES[0])
    else:
        rows = round(data.epoch_rows * (spec.epochs or 1.0))
    return min(data.label_tokens, round(data.label_tokens * rows / data.rows))


def _sequence_length(choices: Choices, spec: PreprocessingSpec, data: DataFacts, method: Method) -> int:
    reason, limit = "the longest row", data.limit
    if data.too_long_rows:
        above = f"{data.too_long_rows:,} rows above {limit.tokens:,}, {limit.source}, were dropped as too_long"
        reason = f"the longest row kept; {above}"
    elif method.too_long is TooLong.SPLIT and data.longest_row == limit.tokens:
        reason = f"{limit.source}; longer texts are split"
    return choices.pick("preprocessing.maxSequenceLength", spec.max_sequence_length, data.longest_row, reason)


def _packing(choices: Choices, spec: PreprocessingSpec, model: ModelFacts, family: str, data: DataFacts) -> bool:
    """Decide whether rows share a pass. Raises CONFIG_UNREADABLE when they are to, but must not."""
    changes_after = model.frequencies_change_after
    same_frequencies = changes_after is None or data.longest_of_all <= changes_after
    if not model.packing_safe:
        reason = f"{family} is not known to keep packed rows apart"
    elif not same_frequencies:
        reason = f"{family} reads a pass with a row above {changes_after:,} tokens with other frequencies"
    else:
        reason = f"{family} passes the packed = unpacked test"
    safe = model.packing_safe and same_frequencies
    if spec.packing and not safe:
        problem = f"{reason}; write false, or leave it out"
        raise StageError(Fault.CONFIG_UNREADABLE, field="spec.preprocessing.packing", problem=problem)
    return choices.pick("preprocessing.packing", spec.packing, safe, reason)


def _trees(choices: Choices, training: _Training, pace: _Pace, method: Method, *, packing: bool) -> bool:
    """Decide whether what the flat sequences of an example share is computed once, where any share something."""
    data, resources = training.data, training.resources
    if data.stored_tokens == data.tokens:
        return False
    flat = data.largest_row if method.denominator.keeps_examples_whole else data.longest_row
    found = computes_trees(
        packing=packing,
        gpu=bool(resources.gpus),
        tokens=data.tokens,
        stored_tokens=data.stored_tokens,
        fits=training.memory_bytes(data.largest_tree, trees=True) <= resources.memory_bytes,
        in_time=data.largest_tree <= max(flat, pace.tokens_per_s * pace.deadline_s),
    )
    return choices.pick("treeAttention", None, found.value, found.reason)


def _adapter(
    choices: Choices,
    spec: FineTuneJobSpec,
    model: ModelFacts,
    label_tokens: int,
    starting_adapter: AdapterFacts | None,
) -> tuple[int, int]:
    kept_rank = _kept_rank(starting_adapter)
    if starting_adapter is not None and not kept_rank:
        asked, reason = spec.model.adapter_from, "the earlier adapter is trained on; Stack keeps it beside a new one"
        choices.pick("model.adapterFrom.mode", asked and asked.mode, starting_adapter.mode, reason)
        reason = "that of the adapter in model.adapterFrom, which training goes on with"
        rank = choices.pick("peft.rank", None, starting_adapter.rank, reason)
        return rank, choices.pick("peft.alpha", None, starting_adapter.alpha, reason)
    peft, most = spec.peft, SERVED_RANKS[-1] - kept_rank
    candidates = [each for each in method_of(spec.method.type).ranks if each <= most] or [most]
    if most < ((peft and peft.rank) or 1):
        problem = f"the adapter that is kept has rank {kept_rank}, and no server takes more than {SERVED_RANKS[-1]} in "
        problem += f"all; write a rank up to {most}" if most > 0 else "all; write model.adapterFrom.mode: Continue"
        raise StageError(Fault.CONFIG_UNREADABLE, field="spec.peft.rank", problem=problem)
    per_rank = model.lora_parameters_per_rank
    rank = next((r for r in candidates if r * per_rank >= label_tokens), candidates[-1])
    reason = f"{rank * per_rank:,} adapter weights for {label_tokens:,} tokens to learn"
    if rank * per_rank < label_tokens:
        reason += "; larger ranks are seldom served"
    elif rank == candidates[0]:
        reason += f"; {rank} is the least for {spec.method.type}"
    if peft is None:
        choices.pick("peft.type", None, "LoRA", "the adapter this release trains")
    rank = choices.pick("peft.rank", peft.rank if peft else None, rank, reason)
    alpha = choices.pick(
        "peft.alpha",
        peft.alpha if peft else None,
        defaults.LORA_ALPHA,
        "with alpha / rank the best learning rate hardly moves with rank",
    )
    if kept_rank:
        text = f"{kept_rank} of the adapter in model.adapterFrom, which is kept as it is, and {rank} beside it"
        choices.note("exportedRank", kept_rank + rank, text)
    return rank, alpha


def _kept_rank(starting_adapter: AdapterFacts | None) -> int:
    """Return the rank of an adapter that is kept beside the one that is trained; 0 where there is none."""
    return starting_adapter.rank if starting_adapter and starting_adapter.mode is AdapterMode.STACK else 0


def _epochs(choices: Choices, spec: HyperparametersSpec, rows: float, method: Method) -> float:
    """Passes over the data; with maxSteps only a measure for the batch size."""
    epochs = method.epochs(rows)
    if spec.max_steps is not None:
        return epochs.value
    return choices.pick("hyperparameters.epochs", spec.epochs, *epochs)


def _batch_size(
    choices: Choices, spec: HyperparametersSpec, data: DataFacts, epochs: float, pace: _Pace, *, trees: bool
) -> int:
    wanted = spec.max_steps or defaults.WANTED_STEPS
    *larger, least = defaults.BATCH_SIZES
    mean_tokens = max(1, data.tokens // data.rows)
    computed_tokens = max(1, data.stored_tokens // data.rows) if trees else mean_tokens
    fitting = [b for b in larger if data.epoch_rows * epochs / b >= wanted and b * mean_tokens <= _MAX_BATCH_TOKENS]
    value = fitting[0] if fitting else least
    reason = f"small, for {f'at least {wanted} steps' if fitting else 'many steps on few rows'}"
    while value > 1 and value * computed_tokens > pace.step_tokens:
        value //= 2
        minutes = pace.deadline_s * _DEADLINE_SHARE / 60
        reason = f"a step of more rows may take over {minutes:.3g} min on {pace.machine}"
    if value > data.distinct_rows:
        value, reason = data.distinct_rows, f"the distinct rows: a step reads none of the {data.distinct_rows:,} twice"
    batch = choices.pick("hyperparameters.globalBatchSize", spec.global_batch_size, value, reason)
    if batch > data.distinct_rows:
        total_rows = spec.max_steps * batch if spec.max_steps else rows_to_read(data.epoch_rows, epochs)
        steps, times = -(-total_rows // batch), -(-min(batch, total_rows) // data.distinct_rows)
        text = f"as written: of {data.distinct_rows:,} distinct rows, each step reads some up to {times:,} times"
        text += "; that is the only step" if steps == 1 else ""
        choices.note("hyperparameters.globalBatchSize", batch, text)
    return batch


def _learning_rate(
    choices: Choices, spec: HyperparametersSpec, model: ModelFacts, family: str, steps: int, method: Method
) -> float:
    """The method's, or 5e-4 · (2000 / hidden)^p: p is 0.781 for Llama, 0.0775 for Qwen (Tinker cookbook, 2025)."""
    if method.learning_rate is not None:
        return choices.pick("hyperparameters.learningRate", spec.learning_rate, *method.learning_rate)
    exponent = next((p for name, p in defaults.LEARNING_RATE_EXPONENTS.items() if family.startswith(name)), None)
    if exponent is None:
        value, reason = defaults.OTHER_LEARNING_RATE, f"{family}: usual for LoRA"
    else:
        width = defaults.LEARNING_RATE_WIDTH
        value = defaults.LEARNING_RATE * (width / max(model.hidden_size, width)) ** exponent
        reason = f"{family} of width {model.hidden_size}"
    if steps < defaults.SHORT_RUN_STEPS:
        value *= defaults.SHORT_RUN_FACTOR
        reason += f", times {defaults.SHORT_RUN_FACTOR} for only {steps} steps"
    return choices.pick("hyperparameters.learningRate", spec.learning_rate, float(f"{value:.3g}"), reason)


def memory_estimate(
    model: ModelFacts,
    family: str,
    rank: int,
    micro_batch_tokens: int,
    longest_row: int,
    gpus: int,
    copied_tokens: int = 0,
    kept_rank: int = 0,
) -> int:
    """Return the bytes of host memory that training needs.

    On the CPU all is fp32: weights, and what a pass takes above them. With a GPU the weights pass through the host
    once in their stored precision. copied_tokens: as in `memory.kept_bytes`.
    """
    if gpus:
        adapter = adapter_bytes(model, rank, False, kept_rank)
        return _PROCESS_BYTES + _CUDA_HOST_BYTES + 2 * model.parameters + adapter
    shape = (micro_batch_tokens, longest_row)
    above_model = pass_bytes(model, family, rank, *shape, gpu=False, copied_tokens=copied_tokens, kept_rank=kept_rank)
    kept = kept_bytes(model, family, rank + kept_rank, *shape, gpu=False, copied_tokens=copied_tokens)
    uneven = int(_UNEVEN_STEPS_SHARE * kept)
    return _PROCESS_BYTES + 4 * model.parameters + above_model + uneven


def gpu_memory_estimate(
    model: ModelFacts, family: str, rank: int, micro_batch_tokens: int, longest_row: int, kept_rank: int = 0
) -> int:
    """Return the bytes of GPU memory that training needs, weights in bf16 included."""
    above_model = pass_bytes(model, family, rank, micro_batch_tokens, longest_row, gpu=True, kept_rank=kept_rank)
    return _CUDA_BYTES + 2 * model.parameters + above_model


def _gpu_memory(choices: Choices, training: _Training, tokens: int) -> int:
    """Return the bytes of GPU memory that training needs, as the plan tells it."""
    needed = gpu_memory_estimate(
        training.model, training.family, training.rank, tokens, training.data.longest_row, training.kept_rank
    )
    choices.pick(
        "gpuMemory", None, f"{needed / GIB:.1f} GiB", "counted for bf16; within 15 % of an H200 at nine shapes"
    )
    return needed


def _micro_batch(
    choices: Choices, training: _Training, batch: int, pace: _Pace, method: Method, *, trees: bool
) -> tuple[int, int]:
    """(tokens of one forward pass, bytes of memory): the most that fits both, never less than has to be in one pass."""
    data, resources = training.data, training.resources
    whole = trees or method.denominator.keeps_examples_whole
    largest = data.largest_tree if trees else data.largest_row
    least = largest if whole else data.longest_row

    def needed(tokens: int) -> int:
        """A step's passes hold no more than its rows, however large the budget is."""
        return training.memory_bytes(min(tokens, batch * largest), trees=trees)

    tokens = max(_GPU_MICRO_BATCH_TOKENS if resources.gpus else _CPU_MICRO_BATCH_TOKENS, least)
    reason = "enough to fill the GPU" if resources.gpus else "more is not faster on a CPU"
    while tokens > least and tokens > pace.step_tokens:
        tokens = max(least, tokens // 2)
        reason = f"more may take long on {pace.machine}"
    while tokens > least and needed(tokens) > resources.memory_bytes:
        tokens = max(least, tokens // 2)
        reason = "what the memory allows"
    if tokens == least:
        reason = "the largest example, all of which is in one pass" if whole else "the longest row"
    if tokens / pace.tokens_per_s > pace.deadline_s:
        seconds = math.ceil(tokens / pace.tokens_per_s)
        reason += f"; it may take {seconds:,} s on {pace.machine}: set recovery.progressDeadlineSeconds above that"
    if needed(tokens) > resources.memory_bytes * _CLEARLY:
        raise StageError(
            Fault.MEMORY_TOO_SMALL,
            needed_gib=round(needed(tokens) / GIB, 1),
            limit_gib=round(resources.memory_bytes / GIB, 1),
        )
    choices.pick("microBatchTokens", None, tokens, reason)
    return tokens, needed(tokens)


def _disk_bytes(training: _Training, plan_bytes: int) -> int:
    """Model files, prepared data, which rows the steps read, two checkpoints in the making, the adapter, logs."""
    model, data = training.model, training.data
    checkpoint = 12 * training.rank * model.lora_parameters_per_rank
    kept = 2 * 4 * training.kept_rank * model.lora_parameters_per_rank  # as it is read, and in what is exported
    files = sum(record.size_bytes for record in model.files)
    return files + data.prepared_bytes + plan_bytes + 3 * checkpoint + kept + 256 * 2**20


def _reference_bytes(method: Method, segments: int) -> int:
    """Return what the reference's log-probabilities take, those of answers under the prompts of others among them."""
    values = (1 + method.needs_drift) * segments if method.needs_reference else 0
    return REFERENCE_VALUE.itemsize * values
