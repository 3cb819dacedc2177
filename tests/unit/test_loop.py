"""The step: what it computes does not depend on how it is computed, and it never spoils the weights."""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune_api.errors import StageError
from finetune_api.job import Schedule
from finetune_api.reasons import Fault
from finetune_trainer import guard, loop
from finetune_trainer.data.examples import Examples, TokenRun, one_segment, pair_of, tree_of
from finetune_trainer.inputs import Batch, fetch_examples, fetch_steps, make_batch
from finetune_trainer.loop import Stepper, learning_rate, make_optimizer
from finetune_trainer.methods.method import Loss, Method
from finetune_trainer.methods.sft import SFT
from finetune_trainer.model import LanguageModel, adapter_parameters, add_adapter, load_base
from finetune_trainer.passes import passes
from finetune_trainer.policy import Scores
from finetune_trainer.runplan import PassLayout
from finetune_trainer.step_plan import StepPlan
from pair_run import joined_trees
from tiny_run import TinyRun, make_run


def _faulty(**faults: Any) -> Method:
    """Return SFT with a fault in the passes that are told."""
    calls = count(1)

    def loss(scores: Scores, batch: Batch) -> Loss:
        fault = faults.get(f"call_{next(calls)}")
        if isinstance(fault, Exception):
            raise fault
        found = SFT.loss(scores, batch)
        return found._replace(sum=found.sum * (1.0 if fault is None else fault))

    return replace(SFT, loss=loss)


def _stepper(run: TinyRun, folder: Path, method: Method = SFT) -> Stepper:
    folder.mkdir(parents=True, exist_ok=True)
    rows = fetch_examples(run.store, run.plan.train, folder / "train")
    steps = fetch_steps(run.store, run.plan, folder)
    lm = load_base(run.folder / "model", run.plan, torch.device("cpu"))
    parameters = list(adapter_parameters(add_adapter(lm, run.plan)).values())
    hyper = run.plan.hyperparameters
    optimizer = make_optimizer(parameters, hyper)
    return Stepper(lm, method, parameters, optimizer, rows, steps, hyper, hyper.micro_batch_tokens)


def _weights(stepper: Stepper) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in stepper.parameters])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), steps=8, batch=6)


@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        (Schedule.LINEAR, 0, 1 / 3),
        (Schedule.LINEAR, 1, 2 / 3),
        (Schedule.LINEAR, 2, 1.0),
        (Schedule.LINEAR, 7, 0.5),
        (Schedule.LINEAR, 11, 0.1),
        (Schedule.COSINE, 2, 1.0),
        (Schedule.COSINE, 7, 0.55),
        (Schedule.COSINE, 12, 0.1),
        (Schedule.CONSTANT, 0, 1 / 3),
        (Schedule.CONSTANT, 11, 1.0),
    ],
)
def test_the_learning_rate_is_a_function_of_the_step(run: TinyRun, schedule: Schedule, step: int, share: float) -> None:
    hyper = run.plan.hyperparameters.model_copy(
        update={"schedule": schedule, "warmup_steps": 2, "total_steps": 12, "learning_rate": 0.01}
    )
    assert learning_rate(step, hyper) == pytest.approx(0.01 * share)


def test_passes_keep_to_the_budget_and_hold_every_row_once() -> None:
    examples = joined_trees([one_segment(*_zeros(length)) for length in (30, 50, 20, 120, 7)])
    rows = examples.sequences_of([2, 0, 1, 3])
    packed = list(passes(examples, [2, 0, 1, 3], 60, PassLayout.PACKED))
    assert sorted(row for group in packed for row in group) == sorted(rows)
    # A row longer than the budget has to fit somewhere.
    assert all(sum(examples.lengths(group)) <= 120 for group in packed)
    assert list(passes(examples, [2, 0, 1, 3], 60, PassLayout.APART)) == [[row] for row in rows]


@pytest.mark.parametrize("layout", [PassLayout.PACKED, PassLayout.APART])
def test_the_sequences_of_an_example_stay_in_one_pass_where_the_method_wants_that(layout: PassLayout) -> None:
    lengths = [(30, 10), (20, 20), (90, 80)]
    examples = joined_trees([pair_of(*(_zeros(length) for length in each)) for each in lengths])
    found = list(passes(examples, [0, 1, 0, 2], 80, layout, whole=True))
    assert sorted(each for group in found for each in group) == sorted(examples.sequences_of([0, 1, 0, 2]))
    assert all([example for example, _ in group[::2]] == [example for example, _ in group[1::2]] for group in found)
    assert all(
        first.leaf + 1 == second.leaf for group in found for first, second in zip(group[::2], group[1::2], strict=True)
    )
    tokens = [sum(examples.lengths(group)) for group in found]
    assert sorted(tokens) == ([120, 170] if layout is PassLayout.PACKED else [40, 40, 40, 170])


def test_weights_do_not_depend_on_how_rows_are_divided_into_passes(run: TinyRun, tmp_path: Path) -> None:
    found: list[Tensor] = []
    for budget_tokens, packing in ((1000, True), (60, True), (1, True), (1000, False)):
        stepper = _stepper(run, tmp_path)
        stepper.budget_tokens = budget_tokens
        stepper.hyper = stepper.hyper.model_copy(update={"packing": packing})
        for step in range(4):
            stepper.run(step)
        found.append(_weights(stepper))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-6, rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_goes_on(run: TinyRun, tmp_path: Path) -> None:
    stepper = _stepper(run, tmp_path / "a", _faulty(call_2=float("nan")))
    stepper.budget_tokens = 1000
    stepper.run(0)
    before = _weights(stepper)
    moments = [stepper.optimizer.state[p]["exp_avg"].clone() for p in stepper.parameters]
    assert stepper.run(1)[2] == 0
    assert torch.equal(_weights(stepper), before)
    for parameter, moment in zip(stepper.parameters, moments, strict=True):
        assert torch.equal(stepper.optimizer.state[parameter]["exp_avg"], moment)
        assert stepper.optimizer.state[parameter]["step"] == 1
    assert stepper.run(2)[2] == 1
    assert torch.isfinite(_weights(stepper)).all()
    assert not torch.equal(_weights(stepper), before)


def test_three_steps_in_a_row_that_are_not_finite_end_the_run_as_diverged() -> None:
    count = guard.nonfinite_in_a_row(0, finite=False, step=5)
    count = guard.nonfinite_in_a_row(count, finite=False, step=6)
    assert guard.nonfinite_in_a_row(count, finite=True, step=7) == 0
    with pytest.raises(StageError, match="3 steps in a row") as caught:
        guard.nonfinite_in_a_row(count, finite=False, step=7)
    assert (caught.value.fault, caught.value.exit_code) == (Fault.NOT_FINITE, 15)


@pytest.mark.parametrize(
    ("before", "loss", "spike"),
    [
        ([], 100.0, False),
        ([2.0] * 9, 100.0, False),  # too few to tell
        ([2.0] * 10, 2.9, False),
        ([2.0] * 10, 3.1, True),  # above 1.5 times the median, as there is no deviation
        ([1.0, 3.0] * 10, 7.9, False),  # median 2, MAD 1
        ([1.0, 3.0] * 10, 8.1, True),
        ([2.0] * 45 + [1e9] * 5, 3.1, True),  # spikes before do not hide it
        ([3.0 - 0.01 * i for i in range(50)], 3.0, False),  # a loss that falls
        ([2.0] * 50, 0.1, False),
        ([2.0] * 50, float("nan"), False),  # counted elsewhere
    ],
)
def test_a_spike_is_a_loss_far_above_those_before(before: list[float], loss: float, spike: bool) -> None:
    assert guard.is_spike(loss, before) is spike


def _one_step(examples: Examples, label_tokens: int, denominator: float) -> StepPlan:
    """A plan of one step that reads all examples."""
    return StepPlan(
        examples=np.arange(len(examples)),
        step_offsets=np.array([0, len(examples)]),
        label_tokens=np.array([label_tokens]),
        denominators=np.array([denominator]),
        tokens=np.array([len(examples.tokens)]),
    )


def _gradient(stepper: Stepper, examples: Examples, label_tokens: int, denominator: float) -> tuple[float, Tensor]:
    stepper.examples, stepper.steps = examples, _one_step(examples, label_tokens, denominator)
    loss = float(stepper.run(0)[0])
    return loss, torch.cat([parameter.grad.flatten() for parameter in stepper.parameters if parameter.grad is not None])


def _unclipped(run: TinyRun, folder: Path) -> Stepper:
    """A step whose gradients are left as they are, on an adapter that is no longer zero."""
    stepper = _stepper(run, folder)
    stepper.hyper = stepper.hyper.model_copy(update={"max_grad_norm": 1e9, "learning_rate": 0.0})
    generator = torch.Generator().manual_seed(3)
    for parameter in stepper.parameters:
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return stepper


def _zeros(length: int) -> TokenRun:
    return TokenRun(np.zeros(length, dtype="u4"), (np.arange(length) > 0).astype("u1"))


def _runs(seed: int, count: int) -> list[TokenRun]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(4, 20, count)
    return [TokenRun(generator.integers(0, 256, n).astype("u4"), (np.arange(n) > n // 2).astype("u1")) for n in lengths]


@pytest.mark.parametrize("trees", [False, True])
def test_a_step_over_trees_learns_what_its_sequences_say_one_by_one(run: TinyRun, tmp_path: Path, trees: bool) -> None:
    """Two answers of one conversation that share their beginning, which is learned in the first alone."""
    stepper = _unclipped(run, tmp_path)
    stepper.hyper = stepper.hyper.model_copy(update={"trees": trees})
    common, first, second, other = _runs(1, 4)
    joined = [
        TokenRun(np.concatenate([common.tokens, end.tokens]), np.concatenate([common.labels, end.labels]))
        for end in (first, second)
    ]
    tree = tree_of(joined)
    assert (tree.lengths.tolist(), tree.parents.tolist()) == (
        [len(common.tokens), len(first.tokens), len(second.tokens)],
        [0, 1, 2],
    )
    only_end = TokenRun(joined[1].tokens, np.concatenate([np.zeros_like(common.labels), second.labels]))
    labels = sum(int(each.labels.sum()) for each in (joined[0], only_end, other))
    found = _gradient(stepper, joined_trees([tree, tree_of([other])]), labels, labels)
    flat = joined_trees([tree_of([each]) for each in (joined[0], only_end, other)])
    expected = _gradient(stepper, flat, labels, labels)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(found[1], expected[1], atol=1e-7, rtol=1e-5)


def test_the_weight_of_an_example_multiplies_its_losses_and_its_part_of_the_denominator(
    run: TinyRun, tmp_path: Path
) -> None:
    stepper = _unclipped(run, tmp_path)
    runs, weights = _runs(2, 3), np.array([0.5, 2.0, 1.0], dtype="f4")
    labels = [int(each.labels.sum()) for each in runs]
    trees = [tree_of([each]) for each in runs]
    alone = [_gradient(stepper, joined_trees([tree]), count, 1.0) for tree, count in zip(trees, labels, strict=True)]
    denominator = float(weights @ np.array(labels))
    loss, gradient = _gradient(stepper, joined_trees(trees, weight=weights), sum(labels), denominator)
    assert loss == pytest.approx(sum(w * one[0] for w, one in zip(weights, alone, strict=True)) / denominator, rel=1e-5)
    expected = sum(float(w) * one[1] for w, one in zip(weights, alone, strict=True)) / denominator
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_the_time_to_make_batches_is_counted(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = _stepper(run, tmp_path)
    now_s = [0.0]

    def slow(*read: Any, **how: Any) -> Batch:
        now_s[0] += 7.0
        return make_batch(*read, **how)

    def busy(self: LanguageModel, batch: Batch) -> Tensor:
        now_s[0] += 100.0
        return computed(self, batch)

    computed = LanguageModel.nll_sum
    monkeypatch.setattr(loop, "make_batch", slow)
    monkeypatch.setattr(LanguageModel, "nll_sum", busy)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now_s[0])
    stepper.run(0)
    passes_run = (now_s[0] - stepper.data_wait_s) / 100.0
    assert passes_run >= 1
    assert stepper.data_wait_s == 7.0 * passes_run


def test_when_gpu_memory_runs_out_the_same_step_is_repeated_in_smaller_passes(run: TinyRun, tmp_path: Path) -> None:
    full = torch.cuda.OutOfMemoryError("injected")
    retried: list[int] = []
    # The first step's second and fourth pass fail: once after a backward, once again at once.
    stepper = _stepper(run, tmp_path / "a", _faulty(call_2=full, call_3=full))
    oom = guard.OomRetry(lambda: retried.append(1))
    for step in range(3):
        oom.run(step, stepper)
    assert len(retried) == 2
    assert stepper.budget_tokens <= run.plan.hyperparameters.micro_batch_tokens // 4
    undisturbed = _stepper(run, tmp_path / "b")
    for step in range(3):
        undisturbed.run(step)
    torch.testing.assert_close(_weights(stepper), _weights(undisturbed), atol=2e-6, rtol=1e-4)


def test_passes_become_smaller_also_where_a_step_is_far_below_the_plans_budget(run: TinyRun, tmp_path: Path) -> None:
    stepper = _stepper(run, tmp_path, _faulty(call_1=torch.cuda.OutOfMemoryError("injected")))
    stepper.budget_tokens = 100 * int(stepper.steps.tokens[0])
    guard.OomRetry(lambda: None).run(0, stepper)
    assert stepper.largest_pass_tokens(0) < int(stepper.steps.tokens[0])


def test_when_smaller_passes_do_not_help_the_run_ends_as_gpu_oom(run: TinyRun, tmp_path: Path) -> None:
    full = torch.cuda.OutOfMemoryError("injected")
    stepper = _stepper(run, tmp_path, _faulty(**{f"call_{i}": full for i in range(1, 9)}))
    with pytest.raises(StageError) as caught:
        guard.OomRetry(lambda: None).run(0, stepper)
    assert (caught.value.fault, caught.value.exit_code) == (Fault.GPU_OOM, 16)


def test_a_first_step_without_any_gradient_for_the_adapter_is_an_error(run: TinyRun, tmp_path: Path) -> None:
    stepper = _stepper(run, tmp_path, _faulty(**{f"call_{i}": 0.0 for i in range(1, 99)}))
    stepper.run(0)
    named = {f"lora_B.{i}": parameter for i, parameter in enumerate(stepper.parameters)}
    with pytest.raises(StageError) as caught:
        guard.check_gradients(named)
    assert caught.value.fault is Fault.ADAPTER_NO_EFFECT


def test_a_layer_that_got_no_gradient_is_named(caplog: pytest.LogCaptureFixture) -> None:
    parameters = {f"layers.{i}.dt_proj.lora_B.default.weight": torch.nn.Parameter(torch.zeros(2)) for i in range(3)}
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full((2,), float(i))
    guard.check_gradients(parameters)
    assert "1 of 3 adapted layers did not learn in this step: layers.0.dt_proj" in caplog.text


@pytest.mark.parametrize(
    ("durations", "limit_s"), [([], 1800.0), ([1.0, 2.0, 3.0], 300.0), ([40.0, 50.0, 1000.0], 500.0)]
)
def test_a_step_may_take_ten_times_the_median_and_five_minutes_the_first_half_an_hour(
    durations: list[float], limit_s: float
) -> None:
    assert guard.stall_limit_s(durations) == limit_s


def test_the_watchdog_notices_a_step_that_takes_too_long_and_nothing_else() -> None:
    now = [0.0]
    watchdog = guard.Watchdog(lambda _step, _seconds: None, clock=lambda: now[0])
    now[0] = 1000.0
    assert watchdog.overdue() is None  # no step yet: loading may take long
    watchdog.begin(7)
    now[0] += 1799.0
    assert watchdog.overdue() is None
    now[0] += 2.0
    assert watchdog.overdue() == (7, 1801.0)
    watchdog.end()
    now[0] += 1000.0  # an evaluation
    assert watchdog.overdue() is None


def test_the_watchdog_gives_a_pass_its_whole_time_again_after_a_pause() -> None:
    now = [0.0]
    watchdog = guard.Watchdog(lambda _step, _seconds: None, clock=lambda: now[0])
    watchdog.begin(7)
    now[0] += 5000.0  # the whole process was paused: no look in between
    assert watchdog.look() is None
    for _ in range(1800):
        now[0] += 1.0
        assert watchdog.look() is None
    now[0] += 1.0
    assert watchdog.look() == (7, 1801.0)
