"""Preference methods learn what is preferred, on rows that they were not trained on too, and tell what goes wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune_api.errors import StageError
from finetune_api.job import MethodType
from finetune_api.layout import ADAPTER, METRICS
from finetune_api.quality import Quality, concern_words
from finetune_api.reasons import Fault, Reason
from finetune_trainer import quality, session, train
from finetune_trainer.guard import MAX_NONFINITE_IN_A_ROW
from finetune_trainer.methods import method_of, planned_method
from finetune_trainer.stop import StopFlag
from pair_run import preference_run
from sums import (
    NEVER_SEEN,
    RIGHT,
    pairs_and_held_out,
    save_taught_model,
    share_preferred,
    thumbs_and_held_out,
)
from tiny_run import TinyRun, context, use_model

DPO, ORPO, KTO = MethodType.DPO, MethodType.ORPO, MethodType.KTO
METHODS: dict[str, tuple[MethodType, dict[str, Any] | None, dict[str, Any]]] = {  # options of the method; of the run
    "DPO": (DPO, None, {}),
    "DPO with the likelihood": (DPO, {"nllWeight": 0.2}, {}),
    "IPO": (DPO, {"loss": "IPO"}, {}),
    "SimPO": (DPO, {"loss": "SimPO"}, {}),
    "ORPO": (ORPO, {"lambda": 1.0}, {}),
    "KTO": (KTO, {"beta": 0.5}, {"steps": 60, "batch": 16}),  # a thumb says less than a pair
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was fine-tuned on sums, and gives right and wrong ones alike."""
    folder = tmp_path_factory.mktemp("taught")
    save_taught_model(folder)
    return folder


def _run_on_sums(
    folder: Path, taught: Path, method: MethodType, options: dict[str, Any] | None = None, **more: Any
) -> TinyRun:
    data = pairs_and_held_out() if method_of(method).sequences == 2 else thumbs_and_held_out()
    settings: dict[str, Any] = {"data": data, "steps": 40, "batch": 8, "learning_rate": 0.005, **more}
    run = preference_run(folder, method, options, **settings)
    use_model(run, taught)
    return run


@pytest.mark.parametrize(("method", "options", "more"), METHODS.values(), ids=METHODS)
def test_a_model_that_gives_right_and_wrong_sums_alike_learns_to_prefer_right_ones_also_of_those_held_out(
    tmp_path: Path, taught: Path, method: MethodType, options: dict[str, Any] | None, more: dict[str, Any]
) -> None:
    run = _run_on_sums(tmp_path, taught, method, options, **more)
    result = train.run(context(run), StopFlag(60))
    assert result.artifact is not None
    base = AutoModelForCausalLM.from_pretrained(taught)
    assert 0.2 <= share_preferred(base) <= 0.8
    assert share_preferred(PeftModel.from_pretrained(base, str(run.local(ADAPTER)))) >= 0.9

    measured = json.loads(run.local(ADAPTER, "eval.json").read_text())["held_out"]
    start, end = (each["figures"] for each in (measured[0], measured[-1]))
    assert 0.2 <= start["reward_accuracy"] <= 0.8
    assert end["reward_accuracy"] >= (0.9 if method is not KTO else 0.7), "of KTO an answer, and no pair, is judged"
    steps = [row for row in map(json.loads, run.local(METRICS).read_text().splitlines()) if "loss" in row]
    assert set(planned_method(run.plan).figures) <= set(steps[0])


def test_a_margin_that_is_not_finite_ends_the_job_by_name_though_loss_and_gradient_are(
    tmp_path: Path, taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the model that the job began with gave some answer no probability at all: its loss is 0 then."""
    reference_of = train.reference_of

    def never_said(*arguments: Any) -> np.ndarray:
        values, path = reference_of(*arguments), arguments[-1]
        if path.name == "reference-train":
            values[::4] = -np.inf  # every other good answer
        return values

    monkeypatch.setattr(train, "reference_of", never_said)
    run = _run_on_sums(tmp_path, taught, KTO)
    with pytest.raises(StageError, match="reward margin") as caught:
        train.run(context(run), StopFlag(60))
    assert caught.value.fault is Fault.NOT_FINITE
    rows = [json.loads(line) for line in run.local(METRICS).read_text().splitlines()]
    # The last of them ends the job before it is written down.
    skipped = [row for row in rows if "loss" in row][1 - MAX_NONFINITE_IN_A_ROW :]
    assert [row["reward_margin"] for row in skipped] == [None] * (MAX_NONFINITE_IN_A_ROW - 1)
    assert all(row["loss"] is not None and row["grad_norm"] is not None for row in skipped)


def _concern_of(run: TinyRun, reason: Reason) -> Quality:
    """Train, and return what was measured: the concern is in result and card, and the job has succeeded."""
    result = train.run(context(run), StopFlag(60))
    assert result.fault is Fault.COMMITTED
    assert result.quality is not None
    assert reason in result.quality.concerns
    words = concern_words(result.quality)[result.quality.concerns.index(reason)]
    assert f"> **{reason}**: {words}" in run.local(ADAPTER, "README.md").read_text()
    return result.quality


def test_good_answers_that_become_unlikely_with_the_bad_ones_are_a_concern(tmp_path: Path, taught: Path) -> None:
    run = _run_on_sums(tmp_path, taught, DPO, {"beta": 0.01}, learning_rate=0.3)
    found = _concern_of(run, Reason.CHOSEN_UNLIKELY)
    assert found.fall is not None
    assert found.fall > quality.MAX_FALL_NATS


def test_a_model_that_has_moved_far_from_its_start_is_a_concern(tmp_path: Path, taught: Path) -> None:
    run = _run_on_sums(tmp_path, taught, KTO, {"beta": 0.01}, learning_rate=0.1)
    found = _concern_of(run, Reason.FAR_FROM_START)
    assert found.drift is not None
    assert found.drift > quality.MAX_DRIFT_NATS


@pytest.mark.parametrize(("method", "options"), [(DPO, None), (DPO, {"loss": "SimPO"}), (ORPO, None)])
def test_columns_that_look_swapped_are_a_concern_from_the_first_evaluation_on(
    tmp_path: Path, taught: Path, monkeypatch: pytest.MonkeyPatch, method: MethodType, options: dict[str, Any] | None
) -> None:
    """The model knows the rejected answers, and no chosen one."""
    run = _run_on_sums(tmp_path, taught, method, options, data=pairs_and_held_out(NEVER_SEEN, RIGHT), steps=6)
    ctx, measure = context(run), session.held_out_loss
    told: list[list[Reason]] = []

    def look_and_measure(*args: Any, **more: Any) -> Any:
        known = ctx.reporter.progress().quality
        told.append([] if known is None else list(known.concerns))
        return measure(*args, **more)

    monkeypatch.setattr(session, "held_out_loss", look_and_measure)
    result = train.run(ctx, StopFlag(60))
    assert told[0] == []
    assert told[1:] == [[Reason.START_PREFERS_REJECTED]] * (len(told) - 1)
    assert len(told) > 1
    assert result.fault is Fault.COMMITTED
    assert result.quality is not None
    assert result.quality.concerns[0] is Reason.START_PREFERS_REJECTED
    words = concern_words(result.quality)[0]
    assert "of 30 held-out pairs" in words
    assert "columns swapped" in words
    assert "datasets[].columns" in words
