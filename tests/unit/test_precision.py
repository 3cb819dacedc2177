"""What a CPU computes in: bf16 only where it is faster and the first loss agrees, and the same when it is resumed."""

import json
import logging
from pathlib import Path

import pytest
import torch

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer import precision, train, world
from finetune_trainer.checkpoint import Position
from finetune_trainer.model import LanguageModel
from finetune_trainer.stop import StopFlag
from tiny_run import TinyRun, context, make_run


def computed_in(run: TinyRun) -> str:
    return json.loads(run.local("adapter/eval.json").read_bytes())["computed_in"]


def faster(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(world, "bf16_is_faster", lambda: answer)


@pytest.mark.parametrize(("is_faster", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_cpu_computes_in_bf16_where_that_is_faster_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_faster: bool, expected: str
) -> None:
    faster(monkeypatch, is_faster)
    run = make_run(tmp_path, steps=4)
    result = train.run(context(run), StopFlag(60))
    assert result.fault is Fault.COMMITTED
    assert computed_in(run) == expected
    assert f"| computed in | {expected} |" in run.local("adapter/README.md").read_text()


def test_a_first_loss_that_bf16_changes_leaves_the_run_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faster(monkeypatch, True)
    measure = precision.first_loss

    def worse_in_bf16(lm: LanguageModel, *rest: object) -> float:
        return measure(lm, *rest) * (1.02 if lm.dtype == torch.bfloat16 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(precision, "first_loss", worse_in_bf16)
    run = make_run(tmp_path, steps=2)
    with caplog.at_level(logging.INFO):
        train.run(context(run), StopFlag(60))
    assert computed_in(run) == "fp32"
    assert "computes in fp32: the first loss is" in caplog.text


def test_a_model_that_does_not_pass_in_bf16_is_trained_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faster(monkeypatch, True)
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
    [(True, True, "bf16"), (False, True, "fp32"), (True, False, "bf16, then fp32")],
    ids=["stays in bf16", "stays in fp32", "a node without the instructions"],
)
def test_a_resumed_run_computes_in_what_it_began_with_where_that_is_not_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, then: bool, expected: str
) -> None:
    run, stop = make_run(tmp_path, steps=6), StopFlag(60)
    faster(monkeypatch, first)
    run_step = train.Stepper.run

    def run_and_stop(self: train.Stepper, number: int) -> torch.Tensor:
        if number == 2:
            stop.set()
        return run_step(self, number)

    monkeypatch.setattr(train.Stepper, "run", run_and_stop)
    with pytest.raises(StageError) as caught:
        train.run(context(run), stop)
    assert caught.value.fault is Fault.INTERRUPTED
    faster(monkeypatch, then)
    result = train.run(context(run, attempt=2), StopFlag(60))
    assert (result.fault, result.resumed_from_step) == (Fault.COMMITTED, 3)
    assert computed_in(run) == expected


def test_a_checkpoint_of_an_earlier_release_was_computed_in_fp32() -> None:
    assert Position(step=1, tokens=1, label_tokens=1, first_started_at=0.0).computed_in == "fp32"


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
    assert world.bf16_is_faster()
    took[torch.bfloat16] = 0.9
    assert not world.bf16_is_faster()
