"""What a CPU computes in: bf16 only where it is faster and the first loss agrees, and the same when it is resumed."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer import precision, train, world
from finetune_trainer.checkpoint import CheckpointManifest, Position
from finetune_trainer.evaluate import HeldOut
from finetune_trainer.model import LanguageModel
from finetune_trainer.stop import StopFlag
from tiny_run import TinyRun, context, make_run, stop_before

HELD_OUT = HeldOut(step=0, loss=1.0, rows=1, label_tokens=1)


def computed_in(run: TinyRun) -> str:
    return json.loads(run.local("adapter/eval.json").read_bytes())["computed_in"]


def speedup(monkeypatch: pytest.MonkeyPatch, times: float, of_pass: float | None = None, loss_ratio: float = 1) -> None:
    """Let this CPU multiply `times` as fast in bf16, and a pass be `of_pass` times as fast, or as much faster."""
    measure = precision.first_pass

    def timed(lm: LanguageModel, *rest: Any) -> precision.FirstPass:
        found = measure(lm, *rest)
        if lm.dtype != torch.bfloat16:
            return replace(found, seconds=1.0)
        return precision.FirstPass(found.loss * loss_ratio, 1.0 / (of_pass or times))

    monkeypatch.setattr(precision, "_WORTH_FLOPS", 0.0)
    monkeypatch.setattr(world, "bf16_speedup", lambda: times)
    monkeypatch.setattr(precision, "first_pass", timed)


def test_a_small_run_is_in_fp32_on_every_cpu_so_that_equal_jobs_have_equal_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup(monkeypatch, 5.0)
    monkeypatch.setattr(precision, "_WORTH_FLOPS", 1e9)
    run = make_run(tmp_path, steps=2)
    train.run(context(run), StopFlag(60))
    assert computed_in(run) == "fp32"


@pytest.mark.parametrize(("times", "expected"), [(5.0, "bf16"), (1.1, "fp32")])
def test_a_cpu_computes_in_bf16_where_that_is_faster_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float, expected: str
) -> None:
    speedup(monkeypatch, times)
    run = make_run(tmp_path, steps=4)
    result = train.run(context(run), StopFlag(60))
    assert result.fault is Fault.COMMITTED
    assert computed_in(run) == expected
    assert f"| computed in | {expected} |" in run.local("adapter/README.md").read_text()


def test_a_first_loss_that_bf16_changes_leaves_the_run_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    speedup(monkeypatch, 5.0, loss_ratio=1.02)
    run = make_run(tmp_path, steps=2)
    with caplog.at_level(logging.INFO):
        train.run(context(run), StopFlag(60))
    assert computed_in(run) == "fp32"
    assert "computes in fp32: the first pass is 5 times as fast in bf16, its loss" in caplog.text


def test_a_pass_that_is_hardly_faster_leaves_the_run_in_fp32_whatever_the_probe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speedup(monkeypatch, 5.0, of_pass=1.15)
    run = make_run(tmp_path, steps=2)
    train.run(context(run), StopFlag(60))
    assert computed_in(run) == "fp32"


def test_a_model_that_does_not_pass_in_bf16_is_trained_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speedup(monkeypatch, 5.0)
    load = precision.load_base

    def refuse_bf16(folder: Path, plan: object, device: torch.device, dtype: torch.dtype) -> LanguageModel:
        if dtype == torch.bfloat16:
            raise StageError(Fault.UNSUPPORTED_MODEL, uri="file:///m", architecture="A", problem="differs")
        return load(folder, plan, device, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(precision, "load_base", refuse_bf16)
    run = make_run(tmp_path, steps=2)
    assert train.run(context(run), StopFlag(60)).fault is Fault.COMMITTED
    assert computed_in(run) == "fp32"


@pytest.mark.parametrize(
    ("first", "then", "expected"),
    [(5.0, 5.0, "bf16"), (5.0, 1.0, "bf16"), (0.2, 5.0, "fp32"), (5.0, 0.2, "bf16, then fp32")],
    ids=["stays in bf16", "measured otherwise on one node", "stays in fp32", "a node without the instructions"],
)
def test_a_resumed_run_computes_in_what_it_began_with_where_that_is_not_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float, then: float, expected: str
) -> None:
    run, stop = make_run(tmp_path, steps=6), StopFlag(60)
    speedup(monkeypatch, first)
    stop_before(monkeypatch, stop, 3)
    with pytest.raises(StageError) as caught:
        train.run(context(run), stop)
    assert caught.value.fault is Fault.INTERRUPTED
    speedup(monkeypatch, then)
    result = train.run(context(run, attempt=2), StopFlag(60))
    assert (result.fault, result.resumed_from_step) == (Fault.COMMITTED, 3)
    assert computed_in(run) == expected


@pytest.mark.parametrize(
    ("earlier", "dtype", "steps_left", "expected"),
    [
        (None, torch.bfloat16, 6, "bf16"),
        ("fp32", torch.bfloat16, 3, "bf16"),  # a GPU's, from a checkpoint of a release that did not say it
        ("bf16", torch.float32, 0, "bf16"),  # no step is left to compute in anything else
        ("bf16", torch.float32, 1, "bf16, then fp32"),
        ("bf16, then fp32", torch.float32, 3, "bf16, then fp32"),
    ],
)
def test_the_card_says_what_the_steps_were_computed_in_and_not_what_the_last_attempt_loaded(
    earlier: precision.ComputedIn | None, dtype: torch.dtype, steps_left: int, expected: str
) -> None:
    assert precision.computed_in(earlier, dtype, steps_left) == expected


def test_a_checkpoint_of_an_earlier_release_was_computed_in_fp32() -> None:
    assert Position(step=1, tokens=1, label_tokens=1, first_started_at=0.0).computed_in == "fp32"


def test_a_checkpoint_of_a_later_release_is_read_although_it_says_more() -> None:
    at = Position(step=1, tokens=1, label_tokens=1, first_started_at=0.0, evaluations=[HELD_OUT])
    state = json.loads(at.model_dump_json())
    state |= {"of_a_later_release": 1}
    state["evaluations"][0] |= {"of_a_later_release": [1]}
    assert Position.model_validate_json(json.dumps(state)) == at
    CheckpointManifest.model_validate(
        {"step": 1, "epoch": 1, "plan_digest": "sha256:" + "0" * 64, "files": [], "new": 1}
    )


def test_the_probe_compares_both_precisions_on_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still but for what each precision is made to take."""
    monkeypatch.undo()  # of the fixture that answers for it
    clock = [0.0]
    took = {torch.float32: 1.0, torch.bfloat16: 0.5}
    linear = torch.nn.functional.linear

    def slow_linear(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        clock[0] += took[weight.dtype]
        return linear(states, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", slow_linear)
    monkeypatch.setattr(world.time, "perf_counter", lambda: clock[0])
    assert world.bf16_speedup() == pytest.approx(2.0)
    took[torch.bfloat16] = 4.0
    clock[0] = 0.0
    assert world.bf16_speedup() == pytest.approx(0.25)
    assert clock[0] == 2 * 5.0, "one turn after the warm-up tells enough"
