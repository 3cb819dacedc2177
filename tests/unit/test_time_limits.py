"""Limits of time know the size of the work: what is alive is seen to be, and a stop is heard in time."""

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer import checkpoint, commit, evaluate, guard, serve, session, train
from finetune_trainer.context import StageContext
from finetune_trainer.data.examples import ARRAYS
from finetune_trainer.inputs import Batch, fetch_examples, fetch_steps
from finetune_trainer.loop import StepAbandonedError, StepPart, Stepper, make_optimizer
from finetune_trainer.methods.sft import SFT
from finetune_trainer.model import LanguageModel, adapter_parameters, add_adapter, load_base
from finetune_trainer.stop import StopFlag, done_after_s
from finetune_trainer.store import Store, open_store
from hand_clock import Clock
from tiny_run import TinyRun, context, make_run, stop_before

PASS_S = 60.0
PASSES = 4  # of a step, a row each


class EnoughError(Exception):
    pass


def _run(folder: Path, **changes: Any) -> TinyRun:
    return make_run(folder, steps=6, batch=PASSES, packing=False, **changes)


def _stepper(run: TinyRun, folder: Path) -> Stepper:
    folder.mkdir(parents=True, exist_ok=True)
    rows, steps = fetch_examples(run.store, run.plan.train, folder / "train"), fetch_steps(run.store, run.plan, folder)
    lm = load_base(run.folder / "model", run.plan, torch.device("cpu"))
    parameters = list(adapter_parameters(add_adapter(lm, run.plan)).values())
    hyper = run.plan.hyperparameters
    optimizer = make_optimizer(parameters, hyper)
    return Stepper(lm, SFT, parameters, optimizer, rows, steps, hyper, hyper.micro_batch_tokens)


def _state(stepper: Stepper) -> list[Tensor]:
    moments = [stepper.optimizer.state[p][name] for p in stepper.parameters for name in ("exp_avg", "exp_avg_sq")]
    return [tensor.detach().clone() for tensor in (*stepper.parameters, *moments)]


def _slow_passes(patch: pytest.MonkeyPatch, clock: Clock, heard: list[int] | None = None) -> None:
    """Every pass of training takes a minute of the hand-moved clock."""
    original = LanguageModel.nll_sum

    def nll_sum(lm: LanguageModel, batch: Batch) -> Tensor:
        clock.now_s += PASS_S
        if heard is not None:
            heard.append(batch.tokens)
        return original(lm, batch)

    patch.setattr(LanguageModel, "nll_sum", nll_sum)
    patch.setattr(session.time, "monotonic", clock)


def test_a_step_given_up_between_two_passes_leaves_everything_as_it_was(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    stepper, undisturbed = _stepper(run, tmp_path / "a"), _stepper(run, tmp_path / "b")
    parts: list[StepPart] = []

    def after_pass(part: StepPart) -> bool:
        parts.append(part)
        return part.passes_done < 2

    for each in (stepper, undisturbed):
        each.run(0)
    before = _state(stepper)
    stepper.after_pass = after_pass
    with pytest.raises(StepAbandonedError):
        stepper.run(1)
    assert [(part.step, part.passes_done, part.passes) for part in parts] == [(1, 1, PASSES), (1, 2, PASSES)]
    assert 0 < parts[0].tokens_done < parts[1].tokens_done < run.plan.train_tokens
    assert all(torch.equal(now, then) for now, then in zip(_state(stepper), before, strict=True))
    assert all(parameter.grad is None for parameter in stepper.parameters)
    stepper.after_pass = lambda _part: True
    for each in (stepper, undisturbed):
        each.run(1)
    assert all(torch.equal(a, b) for a, b in zip(_state(stepper), _state(undisturbed), strict=True))


def test_a_step_whose_passes_are_all_done_is_finished_whatever_is_asked(tmp_path: Path) -> None:
    stepper = _stepper(_run(tmp_path / "run"), tmp_path / "a")
    stepper.after_pass = lambda part: part.passes_done < part.passes
    assert stepper.run(0)[2] == 1


def test_a_stop_with_less_time_than_a_step_takes_ends_in_a_checkpoint_within_that_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, stopped = (_run(tmp_path / name) for name in ("undisturbed", "stopped"))
    train.run(context(undisturbed), StopFlag(60))
    grace_s = 2 * PASS_S  # and a step takes twice as long
    with monkeypatch.context() as patch:
        clock, heard = Clock(time.monotonic()), list[int]()
        stop = StopFlag(grace_s, clock)
        _slow_passes(patch, clock, heard)
        original = session.Session._after_pass  # pyright: ignore[reportPrivateUsage]

        def after_pass(self: session.Session, part: StepPart) -> bool:
            if (part.step, part.passes_done) == (3, 1):
                stop.set()
            return original(self, part)

        patch.setattr(session.Session, "_after_pass", after_pass)
        ctx = context(stopped)
        with pytest.raises(StageError) as caught:
            train.run(ctx, stop)
        assert len(heard) == 3 * PASSES + 1, "no pass more"
        assert stop.remaining_s() == done_after_s(grace_s), "all of the time is left for the checkpoint"
        saved = ctx.reporter.progress().checkpoint
    assert (caught.value.fault, caught.value.args_by_name) == (Fault.INTERRUPTED, {"step": 3})
    assert saved is not None
    assert saved.step == 3
    result = train.run(context(stopped, attempt=2), StopFlag(60))
    assert (result.resumed_from_step, result.step) == (3, 6)
    assert stopped.adapter_bytes() == undisturbed.adapter_bytes()


def test_a_stop_with_time_enough_lets_the_running_step_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(time.monotonic())
    stop = StopFlag(60 * PASS_S, clock)
    _slow_passes(monkeypatch, clock)
    original = session.Session._after_pass  # pyright: ignore[reportPrivateUsage]

    def after_pass(self: session.Session, part: StepPart) -> bool:
        if (part.step, part.passes_done) == (3, 1):
            stop.set()
        return original(self, part)

    monkeypatch.setattr(session.Session, "_after_pass", after_pass)
    with pytest.raises(StageError) as caught:
        train.run(context(_run(tmp_path)), stop)
    assert caught.value.args_by_name == {"step": 4}


def test_what_happens_within_a_step_is_told_pass_by_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, clock = _run(tmp_path), Clock(time.monotonic())
    ctx = context(run)
    _slow_passes(monkeypatch, clock)
    nll_sum = LanguageModel.nll_sum
    seen: list[tuple[int, int, float, float | None]] = []

    def looked_at(lm: LanguageModel, batch: Batch) -> Tensor:
        loss = nll_sum(lm, batch)  # as if the operator asked just before the pass ends
        progress = ctx.reporter.progress()
        seen.append((progress.step, progress.step_tokens, progress.seconds_since_step, progress.eta_seconds))
        return loss

    monkeypatch.setattr(LanguageModel, "nll_sum", looked_at)
    train.run(ctx, StopFlag(60))
    assert max(seconds for _, _, seconds, _ in seen) == PASS_S, "never as long as a step"
    first = [(step, tokens, eta) for step, tokens, _, eta in seen[:PASSES]]
    assert [step for step, _, _ in first] == [0] * PASSES
    assert [tokens for _, tokens, _ in first] == sorted({tokens for _, tokens, _ in first}), "more with every pass"
    assert first[0] == (0, 0, None)
    assert all(eta is not None and eta > 0 for _, _, eta in first[1:]), "the first step has a time left, too"
    assert seen[PASSES][1] == 0, "and the next one begins anew"
    assert ctx.reporter.progress().step_tokens == 0


def test_the_watchdog_watches_passes_however_many_a_step_has() -> None:
    clock = Clock()
    watchdog = guard.Watchdog(lambda _step, _seconds: None, clock=clock, first_limit_s=7200.0)
    watchdog.begin(0)
    clock.now_s += 7199.0  # the first pass of a slow machine, as planned
    assert watchdog.overdue() is None
    watchdog.beat()
    for _ in range(9):
        clock.now_s += 100.0
        assert watchdog.overdue() is None
        watchdog.beat()
    watchdog.end()
    watchdog.begin(1)
    for _ in range(100):  # ten thousand seconds: ten times as long as the step before
        clock.now_s += 100.0
        assert watchdog.overdue() is None
        watchdog.beat()
    clock.now_s += 1001.0
    assert watchdog.overdue() == (1, 1001.0)


def _before(patch: pytest.MonkeyPatch, owner: Any, name: str, then: Callable[[str], object]) -> None:
    """Call `then(name)` before each call of a function."""
    original = getattr(owner, name)

    def called(*args: Any, **given: Any) -> Any:
        then(name)
        return original(*args, **given)

    patch.setattr(owner, name, called)


class Watched:
    """The watchdog of a run, on a hand-moved clock: `overdue` holds (activity, step) of each time it would bark."""

    def __init__(self, ctx: StageContext, clock: Clock, patch: pytest.MonkeyPatch) -> None:
        self.overdue: list[tuple[str, int]] = []
        self._ctx, self._clock = ctx, clock
        self._watchdog: guard.Watchdog | None = None
        patch.setattr(train, "Watchdog", self._make)
        patch.setattr(guard.Watchdog, "start", Watched._no_thread)

    @staticmethod
    def _no_thread(_watchdog: guard.Watchdog) -> None:
        """Start nothing: `after` looks instead."""

    def _make(self, on_stall: Callable[[int, float], None], **given: Any) -> guard.Watchdog:
        self._watchdog = guard.Watchdog(on_stall, clock=self._clock, **given)
        return self._watchdog

    def after(self, seconds: float) -> None:
        """Let time go by, and look."""
        self._clock.now_s += seconds
        if self._watchdog is not None and (late := self._watchdog.overdue()):
            self.overdue.append((self._ctx.reporter.progress().activity, late[0]))


def test_a_session_tells_its_watchdog_of_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(_run(tmp_path))
    watched = Watched(ctx, Clock(), monkeypatch)
    left = 2 * PASSES

    def slow_pass(_name: str) -> None:
        nonlocal left
        left -= 1
        watched.after(guard.FIRST_STALL_S - 1)  # two of them are too much
        if not left:
            raise EnoughError

    _before(monkeypatch, LanguageModel, "nll_sum", slow_pass)
    with pytest.raises(EnoughError):
        train.run(ctx, StopFlag(60))
    assert watched.overdue == []


@pytest.mark.parametrize(("tokens_per_s", "limit_s"), [(1e9, guard.FIRST_STALL_S), (0.01, 96 / 0.01)])
@pytest.mark.parametrize(("more_s", "overdue"), [(-1, []), (1, [("Training", 0)])])
def test_the_first_pass_of_a_slow_machine_has_the_time_that_its_plan_says(
    tokens_per_s: float,
    limit_s: float,
    more_s: int,
    overdue: list[tuple[str, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctx = context(_run(tmp_path, micro_batch_tokens=96))
    watched = Watched(ctx, Clock(), monkeypatch)

    def speed(*_: object) -> float:
        return tokens_per_s

    def first_pass(_lm: LanguageModel, _batch: Batch) -> Tensor:
        watched.after(limit_s + more_s)
        raise EnoughError

    monkeypatch.setattr(LanguageModel, "nll_sum", first_pass)
    monkeypatch.setattr(train, "slow_tokens_per_second", speed)
    with pytest.raises(EnoughError):
        train.run(ctx, StopFlag(60))
    assert watched.overdue == overdue


def test_only_passes_of_steps_are_watched_not_evaluations_saves_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(_run(tmp_path))
    watched = Watched(ctx, Clock(), monkeypatch)
    seen = Counter[str]()

    def long_work(name: str) -> None:
        seen[name] += 1
        watched.after(1e9)

    def always(_checkpointer: checkpoint.Checkpointer) -> bool:
        return True

    for owner, name in (
        (session, "held_out_loss"),
        (session, "snapshot"),
        (checkpoint.Checkpointer, "start"),
        (checkpoint.Checkpointer, "finish"),
        (train, "answers"),
    ):
        _before(monkeypatch, owner, name, long_work)
    monkeypatch.setattr(checkpoint.Checkpointer, "is_due", always)
    train.run(ctx, StopFlag(60))
    assert watched.overdue == []
    assert seen["held_out_loss"] == 4
    assert len(seen) == 5, "all were looked at"


def test_the_save_after_a_step_that_was_given_up_is_not_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context(_run(tmp_path))
    watched = Watched(ctx, Clock(), monkeypatch)

    def give_up(_session: session.Session, _part: StepPart) -> bool:
        return False

    monkeypatch.setattr(session.Session, "_after_pass", give_up)
    _before(monkeypatch, checkpoint.Checkpointer, "finish", lambda _: watched.after(1e9))
    with pytest.raises(StageError) as caught:
        train.run(ctx, StopFlag(60))
    assert (caught.value.fault, caught.value.args_by_name) == (Fault.INTERRUPTED, {"step": 0})
    assert watched.overdue == []


def test_a_slow_evaluation_never_looks_like_standing_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = context(_run(tmp_path))
    clock, waited = Clock(time.monotonic()), list[float]()

    def slow_pass(_name: str) -> None:
        clock.now_s += 1000.0
        waited.append(ctx.reporter.progress().seconds_since_step)
        if len(waited) == 10:  # a pass of each held-out row
            raise EnoughError

    _before(monkeypatch, LanguageModel, "token_logprobs", slow_pass)
    monkeypatch.setattr(serve.time, "monotonic", clock)
    with pytest.raises(EnoughError):
        train.run(ctx, StopFlag(10**6, clock))
    assert ctx.reporter.progress().activity == "Evaluating"
    assert max(waited) < 1001.0, "one pass's time, not that of all before it"


@pytest.mark.parametrize(("seconds", "fits"), [(0.0, True), (40.0, True), (60.0, False)])
def test_half_of_the_time_after_a_stop_is_kept_for_saving(seconds: float, fits: bool) -> None:
    stop = StopFlag(120, Clock())
    assert stop.leaves(1e9), "nobody asked"
    stop.set()
    assert stop.leaves(seconds) is fits


READ_IN_ORDER = [
    *(f"{split}/{name}" for split in ("train", "held_out") for name in ARRAYS),
    *("batches.safetensors", "config.json", "model.safetensors"),
]


def _on_open(patch: pytest.MonkeyPatch, then: Callable[[str], object]) -> list[str]:
    """Call `then(uri)` for every object that is opened to be read whole; returns the URIs so far."""
    opened: list[str] = []
    original = Store._open  # pyright: ignore[reportPrivateUsage]

    def open_and_tell(self: Store, uri: str, if_match: str | None) -> Any:
        opened.append(uri)
        then(uri)
        return original(self, uri, if_match)

    patch.setattr(Store, "_open", open_and_tell)
    return opened


@pytest.mark.parametrize("name", READ_IN_ORDER)
def test_a_stop_is_heard_within_whatever_file_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopFlag(60)
    opened = _on_open(monkeypatch, lambda uri: stop.set() if uri.endswith(name) else None)
    with pytest.raises(StageError) as caught:
        train.run(context(make_run(tmp_path)), stop)
    assert caught.value.fault is Fault.STOPPED
    assert opened[-1].endswith(name), "no other file is begun"


def test_a_stop_is_heard_while_a_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, stop = make_run(tmp_path), StopFlag(60)
    with monkeypatch.context() as patch:
        stop_before(patch, stop, 1)
        with pytest.raises(StageError):
            train.run(context(run), stop)
    again = StopFlag(60)
    opened = _on_open(monkeypatch, lambda uri: again.set() if uri.endswith("state.safetensors") else None)
    with pytest.raises(StageError) as caught:
        train.run(context(run, attempt=2), again)
    assert (caught.value.fault, opened[-1].rpartition("/")[2]) == (Fault.STOPPED, "state.safetensors")


def test_reading_many_slow_files_never_looks_like_standing_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock = make_run(tmp_path), Clock(time.monotonic())
    ctx = context(run)
    waited: list[float] = []

    def slow(_uri: str) -> None:
        clock.now_s += 1000.0
        waited.append(ctx.reporter.progress().seconds_since_step)

    opened = _on_open(monkeypatch, slow)
    monkeypatch.setattr(serve.time, "monotonic", clock)
    train.run(ctx, StopFlag(10**6, clock))
    assert len(opened) > len(READ_IN_ORDER)
    assert max(waited) < 1001.0, "one file's time, not that of all before it"


@pytest.mark.parametrize("transfer", ["upload", "download", "digest", "open"])
def test_every_part_of_a_large_object_is_told_and_what_is_raised_then_leaves_nothing(
    transfer: str, tmp_path: Path
) -> None:
    told: list[int] = []
    last = 4

    def beat() -> None:
        told.append(1)
        if len(told) == last:
            raise EnoughError

    quiet, source, target = open_store(StorageConfig()), tmp_path / "source", tmp_path / "to" / "object"
    source.write_bytes(bytes(3 * 2**20 + 1))  # four parts
    store = quiet.telling(beat)
    run = {
        "upload": lambda: store.upload(source, target.as_uri()),
        "download": lambda: store.download(source.as_uri(), target),
        "digest": lambda: store.digest(source.as_uri()),
        "open": lambda: list(iter(partial(store.open(source.as_uri()).read, 2**20), b"")),
    }[transfer]
    with pytest.raises(EnoughError):
        run()
    assert not target.parent.exists() or list(target.parent.iterdir()) == []
    told.clear()
    last = 99
    run()
    assert len(told) == 4
    quiet.digest(source.as_uri())
    assert len(told) == 4, "the store it was made from stays silent"


def test_a_checkpoint_that_is_uploaded_counts_as_progress_only_while_the_loop_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(time.monotonic())
    ctx = context(make_run(tmp_path))
    monkeypatch.setattr(serve.time, "monotonic", clock)
    for activity, seconds in (("Training", 50.0), ("Saving", 0.0)):
        ctx.reporter.update(activity=activity)
        clock.now_s += 50.0
        ctx.reporter.touch("Saving")
        assert ctx.reporter.progress().seconds_since_step == pytest.approx(seconds)


@pytest.mark.parametrize(("grace_s", "ends"), [(60, True), (3600, False)])
def test_a_stop_after_the_last_step_ends_in_time_or_lets_the_rest_be_done(
    grace_s: int, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, clock = make_run(tmp_path), Clock(time.monotonic())
    ctx, stop, tokens = context(run), StopFlag(grace_s, clock), list[float]()
    original = evaluate._EveryToken.__call__  # pyright: ignore[reportPrivateUsage]

    def slow(self: Any, *args: Any, **other: Any) -> Any:
        if ctx.reporter.progress().step == 12:  # the first answer is tried before step 1
            stop.set()
            clock.now_s += 1.0
            tokens.append(stop.remaining_s())
        return original(self, *args, **other)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate._EveryToken, "__call__", slow)  # pyright: ignore[reportPrivateUsage]
        if ends:
            with pytest.raises(StageError) as caught:
                train.run(ctx, stop)
            assert (caught.value.fault, caught.value.args_by_name) == (Fault.INTERRUPTED, {"step": 12})
            assert len(tokens) == done_after_s(grace_s), "all of its time, and no more"
            assert commit.read_commit(run.store, run.run_uri) is None
        else:
            assert train.run(ctx, stop).exit_code == 0
    if ends:
        result = train.run(context(run, attempt=2), StopFlag(60))
        assert (result.exit_code, result.resumed_from_step) == (0, 12)
