"""What the spec leaves open is chosen by fixed rules, each with its reason."""

from typing import Any

import pytest

from finetune_api.errors import StageError
from finetune_api.job import FineTuneJobSpec, MethodSpec, Schedule
from finetune_api.reasons import Fault
from finetune_api.run import RunResources
from finetune_trainer.data.too_long import LimitSource, SequenceLimit
from finetune_trainer.runplan import ModelFacts, PassLayout
from finetune_trainer.sizing import DataFacts, Sizing, memory_estimate, sequence_limit, size
from finetune_trainer.speed import slow_tokens_per_second

GIB = 2**30
DIGEST = "sha256:" + "0" * 64


def spec(method: str = "SFT", **fields: Any) -> FineTuneJobSpec:
    values = {
        "model": {"uri": "s3://m/x"},
        "method": {"type": method},
        "datasets": [{"uri": "s3://d/a.jsonl"}],
        "output": {"uri": "s3://o/x"},
        **fields,
    }
    return FineTuneJobSpec.model_validate(values)


def model(**fields: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "uri": "s3://m/x",
        "digest": DIGEST,
        "files": [],
        "architecture": "LlamaForCausalLM",
        "hidden_size": 4096,
        "layers": 32,
        "vocabulary_size": 128_256,
        "parameters": 8_030_000_000,
        "context_length": 8192,
        "lora_parameters_per_rank": 2_621_440,
        "target_modules": ["q_proj"],
        "packing_safe": True,
        "widths": {"query": 4096, "key": 1024, "mlp": 14336, "window": None, "windowed_layers": 0},
    }
    return ModelFacts.model_validate(values | fields)


SMALL = model(
    hidden_size=576,
    layers=30,
    parameters=135_000_000,
    vocabulary_size=49_152,
    lora_parameters_per_rank=305_280,
    widths={"query": 576, "key": 192, "mlp": 1536, "window": None, "windowed_layers": 0},
)

UNPACKED = SMALL.model_copy(update={"packing_safe": False})


def data(rows: int = 1000, **fields: Any) -> DataFacts:
    values: dict[str, Any] = {
        "rows": rows,
        "epoch_rows": rows,
        "distinct_rows": rows,
        "tokens": rows * 100,
        "label_tokens": rows * 40,
        "longest_row": 300,
        "longest_of_all": 300,
        "largest_row": fields.get("longest_row", 300),
        "stored_tokens": fields.get("tokens", rows * 100),
        "largest_tree": fields.get("longest_row", 300),
        "most_repeated": 1.0,
        "measured_tokens": rows * 2,
        "prepared_bytes": rows * 500,
        "segments": rows,
        "too_long_rows": 0,
        "limit": SequenceLimit(2048, LimitSource.CONTEXT),
    }
    return DataFacts(**(values | fields))


def sized(
    job: FineTuneJobSpec, facts: DataFacts, base: ModelFacts = SMALL, family: str = "llama", **resources: Any
) -> Sizing:
    granted = {"cpu_count": 2, "memory_bytes": 64 * GIB, "disk_bytes": 100 * GIB, "gpus": 0, **resources}
    return size(job, base, family, facts, RunResources(**granted))


def reason(found: Sizing, field: str) -> str:
    return next(value.reason for value in found.resolved if value.field == field)


@pytest.mark.parametrize(
    ("method", "label_tokens", "rank"),
    [
        ("SFT", 100, 16),
        ("SFT", 16 * 305_280, 16),
        ("SFT", 16 * 305_280 + 1, 32),
        ("SFT", 10**9, 128),
        ("CPT", 100, 64),
        ("CPT", 65 * 305_280, 128),
    ],
)
def test_the_rank_is_the_smallest_with_a_weight_per_token_to_learn(method: str, label_tokens: int, rank: int) -> None:
    found = sized(spec(method), data(label_tokens=label_tokens))
    assert found.hyperparameters.lora_rank == rank
    assert f"{label_tokens:,} tokens to learn" in reason(found, "peft.rank")


@pytest.mark.parametrize(
    ("method", "rows", "rows_read"),
    [
        ("SFT", 5, 50),
        ("SFT", 20, 100),
        ("SFT", 1000, 3000),
        ("SFT", 12_500, 25_000),
        ("SFT", 10**6, 10**6),
        ("CPT", 9, 9),
    ],
)
def test_few_rows_are_read_more_often(method: str, rows: int, rows_read: int) -> None:
    assert sized(spec(method), data(rows)).total_rows == rows_read


@pytest.mark.parametrize(
    ("rows", "fields", "batch"),
    [
        (100, {}, 4),
        (600, {}, 8),
        (1100, {}, 16),
        (5000, {}, 32),
        (5000, {"tokens": 5000 * 3000}, 2),  # on 2 CPUs
        (2, {}, 2),
    ],
)
def test_the_batch_leaves_at_least_200_steps_where_it_can(rows: int, fields: dict[str, int], batch: int) -> None:
    assert sized(spec(), data(rows, **fields)).hyperparameters.global_batch_size == batch


def test_a_step_reads_no_row_twice_unasked() -> None:
    assert sized(spec(), data(400, distinct_rows=3)).hyperparameters.global_batch_size == 3
    assert sized(spec(), data(1)).hyperparameters.global_batch_size == 1
    assert "a step reads none of the 3 twice" in reason(
        sized(spec(), data(400, distinct_rows=3)), "hyperparameters.globalBatchSize"
    )


def test_a_batch_larger_than_the_data_is_kept_and_said_in_words() -> None:
    found = sized(spec(hyperparameters={"globalBatchSize": 32, "epochs": 10}), data(3))
    assert (found.hyperparameters.global_batch_size, found.hyperparameters.total_steps) == (32, 1)
    words = reason(found, "hyperparameters.globalBatchSize")
    assert words == "as written: of 3 distinct rows, each step reads some up to 10 times; that is the only step"


def test_steps_that_read_less_than_the_data_say_so_and_learn_from_less() -> None:
    found = sized(spec(hyperparameters={"maxSteps": 20, "globalBatchSize": 4}), data(751, label_tokens=75_100))
    assert found.total_rows == 80
    assert reason(found, "hyperparameters.maxSteps") == "as written: the steps read 80 of 751 rows"
    assert "for 8,000 tokens to learn" in reason(found, "peft.rank")


def test_experts_that_get_no_adapter_are_named() -> None:
    mixture = SMALL.model_copy(update={"expert_parameters": 100_000_000})
    words = reason(sized(spec(), data(), mixture), "targetModules")
    assert (
        words
        == "the linear layers that PEFT adapts beside them; experts are not adapted: 100,000,000 of 135,000,000 weights"
    )
    assert not any(value.field == "targetModules" for value in sized(spec(), data()).resolved)


@pytest.mark.parametrize(
    ("family", "hidden_size", "learning_rate"),
    [("llama", 4096, 2.86e-4), ("qwen2", 4096, 4.73e-4), ("llama", 576, 5e-4), ("gpt_neox", 4096, 2e-4)],
)
def test_the_learning_rate_follows_family_and_width(family: str, hidden_size: int, learning_rate: float) -> None:
    base = SMALL.model_copy(update={"hidden_size": hidden_size})
    assert sized(spec(), data(), base, family).hyperparameters.learning_rate == pytest.approx(learning_rate)


def test_the_learning_rate_is_higher_for_few_steps() -> None:
    found = sized(spec(hyperparameters={"maxSteps": 50}), data())
    assert found.hyperparameters.learning_rate == pytest.approx(7.5e-4)
    assert "50 steps" in reason(found, "hyperparameters.learningRate")


def test_max_steps_are_kept_and_their_batches_are_full() -> None:
    found = sized(spec(hyperparameters={"maxSteps": 7, "globalBatchSize": 4}), data(10))
    assert (found.hyperparameters.total_steps, found.total_rows) == (7, 28)
    assert not any(value.field == "hyperparameters.epochs" for value in found.resolved)


def test_given_values_are_kept_and_not_explained() -> None:
    given = {"epochs": 2, "learningRate": 1e-5, "globalBatchSize": 3, "warmupRatio": 0, "schedule": "Constant",
             "weightDecay": 0.1, "seed": 7}  # fmt: skip
    job = spec(peft={"type": "LoRA", "rank": 8, "alpha": 16}, hyperparameters=given,
               preprocessing={"packing": False, "maxSequenceLength": 1024})  # fmt: skip
    found = sized(job, data(30))
    hyper = found.hyperparameters
    assert (hyper.lora_rank, hyper.lora_alpha, hyper.learning_rate, hyper.global_batch_size) == (8, 16, 1e-5, 3)
    assert (hyper.warmup_steps, hyper.schedule, hyper.weight_decay, hyper.seed) == (0, Schedule.CONSTANT, 0.1, 7)
    assert (hyper.packing, hyper.max_sequence_length, hyper.total_steps) == (False, 1024, 20)
    assert [value.field for value in found.resolved] == ["microBatchTokens", "precision"]


def test_every_open_value_has_a_reason_and_they_fit_the_status() -> None:
    found = sized(spec(), data())
    assert len(found.resolved) <= 14
    assert all(value.reason and value.value for value in found.resolved)


def test_warmup_is_a_share_of_the_steps() -> None:
    assert sized(spec(hyperparameters={"maxSteps": 1000}), data()).hyperparameters.warmup_steps == 30


@pytest.mark.parametrize(
    ("steps", "measured_tokens", "interval"),
    [
        (1000, 2_000, 100),  # nine times between the steps, whatever they cost
        (1000, 20_000, 200),  # 400,000 tokens are trained on: 20,000 are read four times in a tenth of that time
        (20, 2_000, 20),  # 8,000 tokens: even once would take more
        (20, 800, 7),
        (20, 0, 2),  # nothing is held out
        (1, 2_000, 1),
    ],
)
def test_held_out_rows_are_measured_between_steps_as_often_as_a_tenth_of_the_time_allows(
    steps: int, measured_tokens: int, interval: int
) -> None:
    job = spec(hyperparameters={"maxSteps": steps, "globalBatchSize": 4})
    found = sized(job, data(measured_tokens=measured_tokens))
    assert found.hyperparameters.eval_interval_steps == interval


def test_packing_is_off_for_a_family_that_was_not_shown_to_keep_rows_apart() -> None:
    found = sized(spec(), data(), SMALL.model_copy(update={"packing_safe": False}), "mamba")
    assert not found.hyperparameters.packing
    assert reason(found, "preprocessing.packing") == "mamba is not known to keep packed rows apart"


BILLION = model(
    hidden_size=2048, layers=22, parameters=1_100_000_000, vocabulary_size=32_000, lora_parameters_per_rank=800_000
)


def _step_seconds(found: Sizing, base: ModelFacts, rows: DataFacts, **resources: Any) -> float:
    """How long a planned step takes on a slow machine."""
    granted = RunResources(**{"cpu_count": 2, "memory_bytes": GIB, "disk_bytes": GIB, "gpus": 0, **resources})
    mean = rows.tokens // rows.rows
    speed = slow_tokens_per_second(base, found.hyperparameters.lora_rank, mean, granted)
    return found.hyperparameters.global_batch_size * mean / speed


@pytest.mark.parametrize("deadline_s", [1800, 600, 86_400])
@pytest.mark.parametrize(("cpu_count", "gpus"), [(1, 0), (4, 0), (64, 0), (4, 1)])
def test_a_step_is_planned_so_small_that_a_slow_machine_ends_it_well_within_the_progress_deadline(
    cpu_count: int, gpus: int, deadline_s: int
) -> None:
    rows = data(20_000, tokens=20_000 * 2000, longest_row=2048, longest_of_all=2048)
    job = spec(recovery={"progressDeadlineSeconds": deadline_s})
    found = sized(job, rows, BILLION, cpu_count=cpu_count, gpus=gpus)
    batch = found.hyperparameters.global_batch_size
    seconds = _step_seconds(found, BILLION, rows, cpu_count=cpu_count, gpus=gpus)
    assert batch == 1 or seconds <= deadline_s / 4
    assert batch == 32 or 2 * seconds > deadline_s / 4, "and no smaller than that"
    if batch < 32:
        machine = "this GPU" if gpus else f"{cpu_count} CPUs"
        assert reason(found, "hyperparameters.globalBatchSize") == (
            f"a step of more rows may take over {deadline_s / 240:.3g} min on {machine}"
        )


def test_a_machine_that_is_fast_enough_changes_no_batch() -> None:
    assert sized(spec(), data(20_000)).hyperparameters.global_batch_size == 32
    assert reason(sized(spec(), data(20_000)), "hyperparameters.globalBatchSize") == "small, for at least 200 steps"


def test_a_batch_that_is_given_stays_as_it_is_however_long_it_takes() -> None:
    job = spec(hyperparameters={"globalBatchSize": 512, "maxSteps": 10}, recovery={"progressDeadlineSeconds": 30})
    rows = data(20_000, tokens=20_000 * 2000, longest_row=2048, longest_of_all=2048)
    hyper = sized(job, rows, BILLION).hyperparameters
    assert (hyper.global_batch_size, hyper.micro_batch_tokens) == (512, 2048), "its passes are what has to move"


def test_a_pass_is_planned_smaller_where_the_machine_is_slow() -> None:
    found = sized(spec(recovery={"progressDeadlineSeconds": 1200}), data(longest_row=300), BILLION, cpu_count=1)
    assert 300 < found.hyperparameters.micro_batch_tokens < 2048
    assert reason(found, "microBatchTokens") == "more may take long on 1 CPUs"


def test_a_row_that_may_take_longer_than_the_deadline_is_told_with_what_to_write() -> None:
    rows = data(tokens=1000 * 2000, longest_row=2048, longest_of_all=2048)
    found = sized(spec(recovery={"progressDeadlineSeconds": 60}), rows, BILLION, cpu_count=1)
    said = reason(found, "microBatchTokens")
    assert said.startswith("the longest row; it may take ")
    assert said.endswith(" s on 1 CPUs: set recovery.progressDeadlineSeconds above that")


PHI = SMALL.model_copy(update={"frequencies_change_after": 4096})


@pytest.mark.parametrize(("longest_of_all", "packing"), [(4096, True), (4097, False)])
def test_rows_that_are_read_with_other_frequencies_are_not_packed(longest_of_all: int, packing: bool) -> None:
    found = sized(spec(), data(longest_of_all=longest_of_all), PHI, "phi3")
    assert found.hyperparameters.packing is packing
    if not packing:
        assert "a row above 4,096 tokens with other frequencies" in reason(found, "preprocessing.packing")


@pytest.mark.parametrize(
    ("base", "longest_of_all"), [(PHI, 4097), (SMALL.model_copy(update={"packing_safe": False}), 300)]
)
def test_packing_that_would_mix_up_rows_is_refused_before_anything_is_spent(
    base: ModelFacts, longest_of_all: int
) -> None:
    with pytest.raises(StageError, match="write false, or leave it out") as caught:
        sized(spec(preprocessing={"packing": True}), data(longest_of_all=longest_of_all), base, "phi3")
    assert (caught.value.fault, caught.value.args_by_name["field"]) == (
        Fault.CONFIG_UNREADABLE,
        "spec.preprocessing.packing",
    )


def limit_of(job: FineTuneJobSpec, base: ModelFacts, family: str = "llama", **resources: Any) -> SequenceLimit:
    granted = {"cpu_count": 2, "memory_bytes": 64 * GIB, "disk_bytes": 100 * GIB, "gpus": 0, **resources}
    return sequence_limit(job, base, family, RunResources(**granted))


@pytest.mark.parametrize("asked", [16, 8192])
def test_sequences_are_limited_by_the_spec(asked: int) -> None:
    found = limit_of(spec(preprocessing={"maxSequenceLength": asked}), model())
    assert found == SequenceLimit(asked, LimitSource.ASKED)


def test_sequences_are_limited_by_what_the_model_was_made_for() -> None:
    assert limit_of(spec(), model(context_length=512)) == SequenceLimit(512, LimitSource.CONTEXT)
    with pytest.raises(StageError) as caught:
        limit_of(spec(preprocessing={"maxSequenceLength": 9000}), model())
    assert caught.value.fault is Fault.SEQUENCE_LENGTH_TOO_LONG


@pytest.mark.parametrize("gpus", [0, 1])
def test_by_default_sequences_may_be_as_long_as_the_memory_allows_and_never_longer(gpus: int) -> None:
    base = BILLION.model_copy(update={"context_length": 131_072})
    limits = [limit_of(spec(), base, memory_bytes=gib * GIB, gpus=gpus) for gib in (8, 64, 128)]
    assert {each.source for each in limits} == {LimitSource.GPU if gpus else LimitSource.MEMORY}
    if gpus:
        assert limits[0] == limits[2], "the host's memory is not the GPU's"
        assert 2048 < limits[0].tokens < 131_072
        return
    assert limits[0].tokens == 2048, "below it the job is rather refused"
    assert 2048 < limits[1].tokens < limits[2].tokens
    for gib, limit in ((64, limits[1]), (128, limits[2])):
        needed = [memory_estimate(base, "llama", 128, tokens, tokens, 0) for tokens in (limit.tokens, limit.tokens + 1)]
        assert needed[0] <= gib * GIB < needed[1]


def test_texts_are_split_into_pieces_of_a_length_that_leaves_steps() -> None:
    base = model(context_length=131_072)
    assert limit_of(spec("CPT"), base, memory_bytes=1024 * GIB) == SequenceLimit(8192, LimitSource.TEXTS)
    assert limit_of(spec(), base, memory_bytes=4096 * GIB) == SequenceLimit(131_072, LimitSource.CONTEXT)


def test_rows_that_were_too_long_are_told_beside_the_chosen_length() -> None:
    found = sized(spec(), data(too_long_rows=3, longest_row=2000))
    assert found.hyperparameters.max_sequence_length == 2000
    field = "preprocessing.maxSequenceLength"
    assert "3 rows above 2,048, the model's context length, were dropped" in reason(found, field)
    of_a_gpu = sized(spec(), data(too_long_rows=3, longest_row=2000, limit=SequenceLimit(4096, LimitSource.GPU)))
    assert "3 rows above 4,096, what an assumed GPU of 24 GiB holds, were dropped" in reason(of_a_gpu, field)


def test_only_texts_are_said_to_be_split_at_the_limit() -> None:
    field = "preprocessing.maxSequenceLength"
    assert reason(sized(spec(), data(longest_row=2048)), field) == "the longest row"
    cpt = sized(spec("CPT"), data(longest_row=2048))
    assert reason(cpt, field) == "the model's context length; longer texts are split"


def test_a_forward_pass_shrinks_to_the_memory_but_never_below_the_longest_row() -> None:
    roomy = sized(spec(), data())
    assert roomy.hyperparameters.micro_batch_tokens == 2048
    tight = sized(spec(), data(), memory_bytes=memory_estimate(SMALL, "llama", 16, 512, 300, 0))
    assert tight.hyperparameters.micro_batch_tokens == 512
    assert tight.memory_bytes <= memory_estimate(SMALL, "llama", 16, 512, 300, 0)
    assert reason(tight, "microBatchTokens") == "what the memory allows"


SHARING: dict[str, Any] = {
    "tokens": 1000 * 3400,
    "stored_tokens": 1000 * 1900,
    "longest_row": 1700,
    "largest_row": 3400,
    "largest_tree": 1900,
    "most_repeated": 3400 / 1900,
}


def test_what_the_answers_of_pairs_share_is_planned_once_in_tokens_and_memory() -> None:
    """Passes hold more pairs, and the least that has to be in one of them is smaller."""
    shared, flat = sized(spec("DPO"), data(**SHARING)), sized(spec("DPO"), data(**SHARING), UNPACKED)
    assert shared.hyperparameters.layout is PassLayout.TREES
    assert reason(shared, "treeAttention").startswith("1,900,000 tokens are computed in the place of 3,400,000")
    assert flat.hyperparameters.layout is PassLayout.APART
    assert "sequences may not share a pass" in reason(flat, "treeAttention")
    assert (shared.hyperparameters.micro_batch_tokens, flat.hyperparameters.micro_batch_tokens) == (2048, 3400)
    assert shared.memory_bytes < 0.8 * flat.memory_bytes
    alone = memory_estimate(SMALL, "llama", 16, 2048, 1700, 0)
    assert shared.memory_bytes > alone, "keys and values of the prompt are copied for each answer"
    assert shared.hyperparameters.global_batch_size == flat.hyperparameters.global_batch_size


def test_a_conversation_whose_answers_do_not_fit_one_pass_is_computed_flat() -> None:
    facts = data(**{**SHARING, "largest_tree": 200_000})
    found = sized(spec(), facts, memory_bytes=8 * GIB)
    assert found.hyperparameters.layout is PassLayout.PACKED
    assert "which memory does not allow" in reason(found, "treeAttention")


def test_a_conversation_whose_answers_together_may_outlast_the_deadline_is_computed_flat() -> None:
    """Its longest sequence alone does not. What has to be in one pass anyway is no reason against trees."""
    slow = {**SHARING, "largest_tree": 60_000, "largest_row": 200_000}
    found = sized(spec(), data(**slow), memory_bytes=1000 * GIB)
    assert found.hyperparameters.layout is PassLayout.PACKED
    assert reason(found, "treeAttention").endswith("which may outlast progressDeadlineSeconds")
    assert found.hyperparameters.micro_batch_tokens == 2048
    patient = sized(spec(recovery={"progressDeadlineSeconds": 86_400}), data(**slow), memory_bytes=1000 * GIB)
    assert patient.hyperparameters.layout is PassLayout.TREES
    pairs = sized(spec("DPO"), data(**slow), memory_bytes=1000 * GIB)
    assert pairs.hyperparameters.layout is PassLayout.TREES


def test_jobs_whose_rows_are_one_sequence_each_are_not_told_of_trees() -> None:
    found = sized(spec(), data())
    assert found.hyperparameters.layout is PassLayout.PACKED
    assert not [each for each in found.resolved if each.field == "treeAttention"]


def test_too_little_memory_is_told_with_what_is_needed() -> None:
    with pytest.raises(StageError) as caught:
        sized(spec(), data(), model(), memory_bytes=16 * GIB)
    assert caught.value.fault is Fault.MEMORY_TOO_SMALL
    assert caught.value.args_by_name["limit_gib"] == 16.0
    assert float(caught.value.args_by_name["needed_gib"]) > 32


def test_a_gpu_is_filled_with_more_tokens() -> None:
    assert sized(spec(), data(longest_row=2000), gpus=1).hyperparameters.micro_batch_tokens == 8192


def test_the_plan_says_how_much_gpu_memory_it_counted() -> None:
    found = sized(spec(), data(longest_row=2000), model(), gpus=1)
    assert found.gpu_memory_bytes is not None
    assert 2 * 8_030_000_000 < found.gpu_memory_bytes < 80 * GIB
    assert "counted for bf16" in reason(found, "gpuMemory")
    assert sized(spec(), data()).gpu_memory_bytes is None


def test_too_little_disk_is_told_before_training() -> None:
    with pytest.raises(StageError) as caught:
        sized(spec(), data(prepared_bytes=115 * GIB))
    assert caught.value.fault is Fault.DISK_TOO_SMALL
    assert caught.value.args_by_name["limit_gib"] == 100.0
    assert float(caught.value.args_by_name["needed_gib"]) > 115
    assert "raise resources.disk" in str(caught.value)


def test_more_rows_than_can_be_planned_are_refused_by_the_field() -> None:
    with pytest.raises(StageError) as caught:
        sized(spec(hyperparameters={"maxSteps": 10_000_000, "globalBatchSize": 65536}), data())
    assert caught.value.args_by_name["field"] == "spec.hyperparameters.maxSteps"


@pytest.mark.parametrize(
    ("method", "values"),
    [({"type": "SFT"}, 0), ({"type": "DPO"}, 1), ({"type": "DPO", "dpo": {"loss": "SimPO"}}, 0), ({"type": "ORPO"}, 0),
     ({"type": "KTO"}, 2)],
)  # fmt: skip
def test_what_the_base_says_of_the_answers_is_in_the_disk_that_is_planned(method: dict[str, Any], values: int) -> None:
    """Four bytes a segment; KTO's twice, as each prompt is also read with another's answer."""
    job = spec().model_copy(update={"method": MethodSpec.model_validate(method)})
    few, many = (sized(job, data(segments=segments)).disk_bytes for segments in (0, 10**9))
    assert many - few == 4 * 10**9 * values
