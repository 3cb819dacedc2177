"""Whether a trained model is worse than the one it began with: the judgement, and a model that was destroyed."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from finetune_api.job import MethodType
from finetune_api.layout import ADAPTER
from finetune_api.quality import FIGURE_WORDS, MAX_FIGURES, Quality, concern_words, figure_words, verdict
from finetune_api.reasons import Reason
from finetune_trainer import evaluate, quality, session, train
from finetune_trainer.evaluate import HeldOut, held_out_loss
from finetune_trainer.export import EVAL
from finetune_trainer.inputs import fetch_examples
from finetune_trainer.methods import METHODS
from finetune_trainer.methods.sft import SFT
from finetune_trainer.model import load_base
from finetune_trainer.runplan import PassLayout
from finetune_trainer.stop import StopFlag
from tiny_run import STOP_ID, TinyRun, context, make_run, random_rows, tiny_config, tiny_model, use_model

WORSE, RUN_ON, DIVERGING = Reason.WORSE_THAN_START, Reason.ANSWERS_DO_NOT_END, Reason.DIVERGING
SWAPPED = Reason.START_PREFERS_REJECTED


@pytest.fixture(autouse=True)
def short_answers() -> None:
    """All tokens of an answer, as here it matters whether it ends."""


def held_out(loss: float, rows: int = 100, **more: Any) -> HeldOut:
    return HeldOut.model_validate({"step": 0, "loss": loss, "rows": rows, "label_tokens": 10 * rows, **more})


def test_the_change_of_a_token_weighted_mean_has_the_error_of_rows_drawn_at_random() -> None:
    generator = np.random.default_rng(7)
    labels = generator.integers(1, 60, 200)
    before = labels * generator.gamma(4, 0.5, 200)
    after = before + labels * generator.normal(1.0, 0.4, 200)
    found = quality.paired_change(before.tolist(), after.tolist(), labels.tolist())
    assert found.nats == pytest.approx((after.sum() - before.sum()) / labels.sum())
    draws = generator.integers(0, 200, (4000, 200))  # the bootstrap over rows needs no formula
    changes = (after[draws].sum(1) - before[draws].sum(1)) / labels[draws].sum(1)
    assert found.standard_error == pytest.approx(changes.std(), rel=0.05)


@pytest.mark.parametrize(
    ("before", "after", "nats", "error"),
    [
        ([2.0, 4.0], [2.0, 4.0], 0.0, 0.0),
        ([2.0], [3.0], 0.5, math.inf),
        ([], [], 0.0, math.inf),
        ([2.0, 4.0], [math.inf, 4.0], math.inf, math.inf),
    ],
)
def test_the_change_is_defined_for_every_number_of_rows(
    before: list[float], after: list[float], nats: float, error: float
) -> None:
    found = quality.paired_change(before, after, [2] * len(before))
    assert (found.nats, found.standard_error) == (nats, error)


@pytest.mark.parametrize(
    ("start", "now", "worse"),
    [
        (held_out(3.19), held_out(28.0, change=24.81, change_error=1.0), True),
        (held_out(3.0), held_out(3.02, change=0.02, change_error=0.009), True),
        (held_out(3.0), held_out(3.02, change=0.02, change_error=0.011), False),
        (held_out(3.0), held_out(2.9, change=-0.1, change_error=0.01), False),
        (held_out(3.0, 49), held_out(3.4, 49, change=0.4, change_error=0.01), False),
        (held_out(3.0, 49), held_out(3.6, 49, change=0.6, change_error=9.0), True),
        (held_out(3.0), held_out(3.6), True),  # resumed from a checkpoint without the rows of the start
        (held_out(3.0), held_out(3.4), False),
        (held_out(3.0), held_out(math.nan, change=math.nan, change_error=math.inf), True),
        (held_out(3.0), held_out(math.inf, change=math.inf, change_error=math.inf), True),
        (held_out(math.nan), held_out(2.0, change=math.nan, change_error=math.inf), False),
    ],
)
def test_a_model_is_worse_beyond_two_standard_errors_or_half_a_nat_on_few_rows(
    start: HeldOut, now: HeldOut, worse: bool
) -> None:
    assert quality.is_worse(start, now) is worse
    found = quality.after_training([start, now], 3.0, 0)
    assert (WORSE in found.concerns) is worse
    Quality.model_validate_json(found.model_dump_json())


@pytest.mark.parametrize(
    ("ends", "probability", "run_on"),
    [(200, 0.001, True), (200, 0.05, False), (200, 0.9, False), (4, 0.001, False), (5, 0.001, True), (0, None, False)],
)
def test_answers_run_on_where_the_stop_token_has_become_next_to_impossible(
    ends: int, probability: float | None, run_on: bool
) -> None:
    now = held_out(2.0, answer_ends=ends, end_probability=probability)
    start = held_out(3.0, answer_ends=ends, end_probability=probability and 0.0001)
    found = quality.after_training([start, now], None, 0)
    assert found.concerns == ([RUN_ON] if run_on else []), "whether the base ended its answers does not matter"


def test_answers_run_on_where_none_that_was_learned_ends_with_a_stop_token() -> None:
    assert quality.after_training([held_out(3.0), held_out(2.0)], None, 0, no_ends=True).concerns == [RUN_ON]
    unmeasured = quality.after_training([], 3.0, 12, no_ends=True)
    assert unmeasured.concerns == [DIVERGING, RUN_ON]
    assert "nothing teaches the model where answers end" in concern_words(unmeasured)[1]


def test_ends_that_nobody_learned_in_the_held_out_rows_are_said_to_be_unmeasured() -> None:
    found = quality.after_training([held_out(3.0), held_out(2.0)], None, 0)
    assert verdict(found).reason is Reason.NO_CONCERN
    assert "whether answers end was not measured" in figure_words(found)


def test_a_loss_far_above_the_start_for_ten_steps_in_a_row_is_a_divergence() -> None:
    losses = [*[3.0] * 5, *[28.0] * 9, 3.0, *[4.4] * 50, *[28.0] * 10]
    above, said = 0, list[bool]()
    for loss in losses:
        above = quality.steps_above_start(above, loss, 3.2)
        said.append(quality.while_training(3.2, above) is not None)
    assert said == [False] * (len(losses) - 1) + [True]


def test_a_loss_that_was_small_may_rise_by_a_nat() -> None:
    assert quality.steps_above_start(3, 1.0, 0.1) == 0
    assert quality.steps_above_start(3, 1.2, 0.1) == 4


def test_without_held_out_rows_the_steps_are_what_is_judged_by() -> None:
    assert quality.after_training([], 3.0, 12).concerns == [DIVERGING]
    nothing = quality.after_training([], 3.0, 0)
    assert verdict(nothing).reason is Reason.NOT_MEASURED


@pytest.mark.parametrize(
    ("pairs", "chosen_likelier", "swapped"),
    [(100, 0.09, True), (20, 0.0, True), (19, 0.0, False), (100, 0.1, False), (100, math.nan, False)],
)
def test_a_start_that_prefers_nearly_all_rejected_answers_is_a_concern_before_any_step_and_after_all(
    pairs: int, chosen_likelier: float, swapped: bool
) -> None:
    start = held_out(0.69, pairs, figures={"chosen_likelier": chosen_likelier})
    before, after = (
        quality.while_training(None, 0, start),
        quality.after_training([start, held_out(0.3, pairs)], 0.7, 0),
    )
    assert (before is not None) is swapped
    assert (SWAPPED in after.concerns) is swapped
    for found in filter(None, (before, after if swapped else None)):
        Quality.model_validate_json(found.model_dump_json())
        (words,) = concern_words(found)
        assert f"of {pairs} held-out pairs" in words
        assert f"in a share of {1 - chosen_likelier:.3f}" in words


def test_all_that_methods_measure_has_words_and_room() -> None:
    for method in METHODS.values():
        assert set(method.figures) <= set(FIGURE_WORDS)
        assert len(method.figures) <= MAX_FIGURES


@pytest.mark.parametrize("loss", [2.0, math.nan])
def test_a_start_that_has_no_loss_leaves_the_model_unmeasured_and_not_without_concern(loss: float) -> None:
    found = quality.after_training([held_out(math.nan), held_out(loss, change=math.nan)], 3.0, 0)
    reason, message = verdict(found)
    assert reason is Reason.NOT_MEASURED
    assert "no number on 100 held-out rows" in message


def test_every_concern_has_words_with_its_figures() -> None:
    figures = {"held_out_rows": 39, "start_loss": 3.19, "loss": 28.0, "change_error": 1.5, "answer_ends": 60,
               "start_end_probability": 0.71, "end_probability": 0.0001, "first_train_loss": 3.3,
               "steps_above_start": 12}  # fmt: skip
    found = Quality.model_validate({"concerns": [WORSE, RUN_ON, DIVERGING], **figures})
    worse, run_on, diverging = concern_words(found)
    assert "39 held-out rows" in worse
    assert "28.000" in worse
    assert "3.190" in worse
    assert "60 true ends" in run_on
    assert "0.710" in run_on
    assert "12 steps" in diverging
    lost = " ".join(concern_words(Quality(concerns=[WORSE, RUN_ON, DIVERGING])))
    assert "(standard error of the difference unknown)" in lost, "one held-out row has none"


def teach_nonsense(run: TinyRun) -> None:
    """Teach the same token everywhere, also where answers end."""
    train_rows = run.plan.train
    path = Path(train_rows.arrays["tokens"].uri.removeprefix("file://"))
    tokens = np.fromfile(path, "<u4")
    tokens[np.fromfile(train_rows.arrays["labels"].uri.removeprefix("file://"), "u1") == 1] = 7
    tokens.tofile(path)
    info = run.store.head(train_rows.arrays["tokens"].uri)
    assert info is not None
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    record = train_rows.arrays["tokens"].model_copy(update={"etag": info.etag, "sha256": digest})
    run.write_plan(
        run.plan.model_copy(
            update={"train": train_rows.model_copy(update={"arrays": train_rows.arrays | {"tokens": record}})}
        )
    )


def test_a_model_whose_answers_do_not_end_is_committed_with_the_concern_in_result_card_and_eval_json(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, steps=20, learning_rate=5e-2)
    teach_nonsense(run)
    ctx = context(run)
    result = train.run(ctx, StopFlag(60))
    assert result.exit_code == 0
    assert result.quality is not None
    assert result.quality.concerns == [RUN_ON]
    assert result.quality == ctx.reporter.progress().quality
    assert result.quality.loss is not None
    assert result.quality.start_loss is not None
    found = json.loads(run.local("adapter", "eval.json").read_text())
    assert Quality.model_validate(found["quality"]) == result.quality
    assert found["held_out"][-1]["change"] == pytest.approx(result.quality.loss - result.quality.start_loss)
    card = run.local("adapter", "README.md").read_text()
    assert card.partition("# tiny\n")[2].strip().startswith("> **AnswersDoNotEnd**")
    again = train.run(context(run, attempt=2), StopFlag(60))
    assert again.quality == result.quality, "an attempt that only finds the commit says it too"


def teach_base(run: TinyRun, folder: Path) -> None:
    """Let the run begin with a model that knows the held-out rows by heart, and so has something to lose."""
    model = tiny_model(tiny_config("llama"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    tokens, labels = random_rows(10, 2)
    ids = pad_sequence([torch.from_numpy(each.astype("i8")) for each in tokens], batch_first=True)
    learned = pad_sequence([torch.from_numpy(each.astype(bool)) for each in labels], batch_first=True)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=torch.where(learned, ids, -100)).loss.backward()
        optimizer.step()
    shutil.copytree(run.folder / "model", folder)
    model.save_pretrained(folder)
    use_model(run, folder)


def test_a_model_that_training_destroys_is_committed_with_the_concern_in_result_card_and_eval_json(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, steps=20, learning_rate=0.3)
    teach_base(run, tmp_path / "taught")
    ctx = context(run)
    result = train.run(ctx, StopFlag(60))
    assert result.exit_code == 0
    assert result.quality is not None
    assert result.quality.concerns[0] is WORSE
    assert result.quality == ctx.reporter.progress().quality
    found = json.loads(run.local("adapter", "eval.json").read_text())
    assert Quality.model_validate(found["quality"]) == result.quality
    start, end = found["held_out"][0]["loss"], found["held_out"][-1]["loss"]
    assert end - start > quality.FEW_ROWS_NATS
    card = run.local("adapter", "README.md").read_text()
    assert card.partition("# tiny\n")[2].strip().startswith("> **WorseThanStart**")


def test_a_template_that_ends_no_answer_raises_the_concern_and_plain_text_does_not(tmp_path: Path) -> None:
    found: list[list[Reason]] = []
    for method in (MethodType.SFT, MethodType.CPT):
        run = make_run(tmp_path / method, steps=2, method=method)
        run.write_plan(run.plan.model_copy(update={"stop_token_ids": []}))
        result = train.run(context(run), StopFlag(60))
        assert result.quality is not None
        found.append(list(result.quality.concerns))
    assert found == [[RUN_ON], []]


def _one_more(before: int, _loss: float, _first_loss: float) -> int:
    return before + 1


def test_a_divergence_is_told_until_the_finished_model_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, steps=20)
    ctx, told = context(run), dict[int, Quality | None]()
    measure = session.held_out_loss
    # Every step counts as one above the start: a model that knows nothing has little to lose.
    monkeypatch.setattr(quality, "steps_above_start", _one_more)

    def look_and_measure(*args: Any, **more: Any) -> Any:
        progress = ctx.reporter.progress()
        told[progress.step] = progress.quality
        return measure(*args, **more)

    monkeypatch.setattr(session, "held_out_loss", look_and_measure)
    result = train.run(ctx, StopFlag(60))
    assert result.quality is not None
    assert result.quality.steps_above_start >= quality.DIVERGING_STEPS
    assert told[0] is None
    last = told[20]
    assert last is not None, "the operator would tell that the loss is no longer far above where it began"
    assert last.concerns == [DIVERGING]


def test_all_held_out_rows_are_measured_at_both_ends_and_a_sample_of_them_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "MAX_HELD_OUT_ROWS", 4)
    measured: list[list[int] | None] = []
    measure = session.held_out_loss

    def look_and_measure(*args: Any, **more: Any) -> Any:
        measured.append(more["rows"])
        return measure(*args, **more)

    monkeypatch.setattr(session, "held_out_loss", look_and_measure)
    run = make_run(tmp_path, steps=6)
    result = train.run(context(run), StopFlag(60))
    sample = evaluate.sampled_rows(10, run.plan.hyperparameters.seed)
    assert measured == [None, sample, sample, None]
    assert len(sample) == len(set(sample)) == 4
    assert sample != evaluate.sampled_rows(10, run.plan.hyperparameters.seed + 1)
    found = json.loads(run.local(ADAPTER, EVAL).read_bytes())["held_out"]
    assert [each["rows"] for each in found] == [10, 4, 4, 10]
    assert result.quality is not None
    assert (result.quality.held_out_rows, result.quality.change_error is not None) == (10, True)


def test_the_ends_of_answers_are_measured_for_sft_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2)
    sft = train.run(context(run), StopFlag(60)).quality
    assert sft is not None
    assert sft.answer_ends == 10, "every held-out row is one answer"
    assert sft.start_end_probability is not None


def test_where_questions_are_learned_too_only_the_last_end_of_a_row_is_an_answers(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=1)
    assert run.plan.held_out is not None
    labels = Path(run.plan.held_out.arrays["labels"].uri.removeprefix("file://"))
    every = np.ones_like(np.fromfile(labels, "u1"))
    rows = fetch_examples(run.store, run.plan.held_out, tmp_path / "rows")
    ids = np.array(rows.tokens)
    starts = rows.segment_offsets[:-1] + 1
    ids[starts] = STOP_ID  # as a template ends each turn
    learned = replace(rows, tokens=ids, labels=every)
    lm = load_base(run.folder / "model", run.plan, torch.device("cpu"))
    found = [
        held_out_loss(
            lm, SFT, learned, 10_000, PassLayout.PACKED, 0, StopFlag(60), end_ids=[STOP_ID], last_ends=last_ends
        )
        for last_ends in (False, True)
    ]
    assert [each.held_out.answer_ends for each in found if each is not None] == [20, 10]
    alone = held_out_loss(lm, SFT, rows, 10_000, PassLayout.PACKED, 0, StopFlag(60), end_ids=[STOP_ID])
    assert alone is not None
    assert alone.held_out.answer_ends == 10


def test_a_checkpoint_without_the_rows_of_the_start_leaves_the_change_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, steps=4)
    measure = session.held_out_loss
    measured: list[int] = []

    def without_rows(*args: Any, **more: Any) -> Any:
        found = measure(*args, **more)
        assert found is not None
        measured.append(0)
        return replace(found, row_losses=[]) if len(measured) == 1 else found

    monkeypatch.setattr(session, "held_out_loss", without_rows)
    result = train.run(context(run), StopFlag(60))
    assert result.quality is not None
    assert (result.quality.held_out_rows, result.quality.change_error) == (10, None)
