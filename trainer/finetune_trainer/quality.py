"""Judge the trained model against the one it began with. Pure: figures in, `Quality` out; the words are in the API.

The standard error is that of the difference between two token-weighted means over the same rows: rows are drawn, tokens
come with them (a ratio estimator with rows as clusters; Miller, "Adding Error Bars to Evals", arXiv 2411.00640, §2-3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune_api.base import finite
from finetune_api.quality import Concern, Quality, Unit
from finetune_api.reasons import Reason
from finetune_trainer.evaluate import HeldOut

MIN_ROWS = 50  # below, the standard error says little
STANDARD_ERRORS = 2.0
FEW_ROWS_NATS = 0.5
MIN_ENDS = 5
# A model that knows where answers end gives the stop token most of the probability at some of their ends, and little
# at others, where more could have followed; a mean of 1 in 20 is that of a model whose answers run on.
MIN_END_PROBABILITY = 0.05
DIVERGING_STEPS = 10
# Preference methods may make both answers less likely, but by little: with a fall of half a nat each token of a good
# answer is 40 % less likely than it was.
MAX_FALL_NATS = 0.5  # per token of answers to give
MAX_DRIFT_NATS = 0.5  # per token of answers under prompts of others
# A model finds two answers of people alike likely, more or less; where it prefers nearly all that were rejected, chosen
# and rejected may have been confused.
MAX_REJECTED_LIKELIER = 0.9  # share of the pairs
MIN_PAIRS = 20  # below, chance says as much
_GIVEN = ("chosen", "good")  # of the figures of answers to give, by the method


@dataclass(frozen=True)
class Change:
    """How much a token-weighted mean loss differs from the one before: nats per label token."""

    nats: float
    standard_error: float


def paired_change(before: Sequence[float], after: Sequence[float], label_tokens: Sequence[int]) -> Change:
    """Return the change from `before` to `after`, each the summed loss of every row, with its standard error.

    The error is infinite for less than two rows. Figures that are not numbers give a change that is none.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    labels = np.asarray(label_tokens, dtype=np.float64)
    rows, total = len(labels), max(1.0, float(labels.sum()))
    nats = float(difference.sum()) / total
    if rows < 2:
        return Change(nats, math.inf)
    with np.errstate(invalid="ignore"):
        spread = float(((difference - nats * labels) ** 2).sum())
    return Change(nats, math.sqrt(rows / (rows - 1) * spread) / total if math.isfinite(spread) else math.inf)


def is_worse(start: HeldOut, now: HeldOut) -> bool:
    """Return whether the held-out loss is worse than at the start by more than chance, or is no number any more."""
    if not math.isfinite(start.loss):
        return False
    if not math.isfinite(now.loss):
        return True
    change, error = now.change, now.change_error
    if now.rows < MIN_ROWS or change is None or error is None or not math.isfinite(error):
        return now.loss - start.loss > FEW_ROWS_NATS
    return change > STANDARD_ERRORS * error


def answers_run_on(now: HeldOut) -> bool:
    """Return whether the stop token has become next to impossible where answers end."""
    probability = now.end_probability
    if probability is None or now.answer_ends < MIN_ENDS:
        return False
    return not probability >= MIN_END_PROBABILITY


def steps_above_start(before: int, loss: float, first_loss: float) -> int:
    """Return the number of steps in a row, this one included, whose loss is far above the first step's.

    Far is half as much again and a whole nat: one batch differs from another by less.
    """
    return before + 1 if loss > max(1.5 * first_loss, first_loss + 1.0) else 0


def rejected_likelier(start: HeldOut) -> float | None:
    """Return the share of pairs whose rejected answer the model finds likelier per token; None without pairs."""
    chosen_likelier = start.figures.get("chosen_likelier")
    return None if chosen_likelier is None else 1 - chosen_likelier


def prefers_rejected(start: HeldOut) -> bool:
    """Return whether the model that the job began with finds nearly every rejected answer likelier."""
    share = rejected_likelier(start)
    return share is not None and start.rows >= MIN_PAIRS and share > MAX_REJECTED_LIKELIER


def while_training(first_loss: float | None, steps_above: int, start: HeldOut | None = None) -> Quality | None:
    """Return what the steps and the first evaluation say: None as long as they raise no concern."""
    concerns: list[Concern] = []
    if start is not None and prefers_rejected(start):
        concerns.append(Reason.START_PREFERS_REJECTED)
    if first_loss is not None and steps_above >= DIVERGING_STEPS:
        concerns.append(Reason.DIVERGING)
    if not concerns:
        return None
    return Quality(
        concerns=concerns,
        first_train_loss=first_loss,
        steps_above_start=steps_above,
        held_out_rows=start.rows if start is not None else 0,
        rejected_likelier=finite(rejected_likelier(start)) if start is not None else None,
    )


def fall(start: HeldOut, now: HeldOut) -> float | None:
    """Return by how much answers to give have become less likely, in nats per token; None where it is not measured."""
    for given in _GIVEN:
        tokens = now.figures.get(f"{given}_tokens")
        before, after = (each.figures.get(f"{given}_logprob") for each in (start, now))
        if tokens and before is not None and after is not None:
            return (before - after) / tokens
    return None


def drift(now: HeldOut) -> float | None:
    """Return the estimate of the KL divergence from the start in nats per token; None where it is not measured."""
    kl, tokens = now.figures.get("kl"), now.figures.get("answer_tokens")
    return None if kl is None or not tokens else kl / tokens


def after_training(
    evaluations: Sequence[HeldOut],
    first_loss: float | None,
    steps_above: int,
    *,
    no_ends: bool = False,
    unit: Unit = "token",
) -> Quality:
    """Return what is known of the finished model; the first evaluation is of the model that the job began with.

    Without held-out rows the steps are all there is to judge by; with them they are not needed. no_ends: no answer
    that was learned ends with a stop token. unit: what losses are means over.
    """
    if not evaluations:
        found = while_training(first_loss, steps_above) or Quality()
        if no_ends:
            found.concerns.append(Reason.ANSWERS_DO_NOT_END)
        return found
    start, now = evaluations[0], evaluations[-1]
    concerns: list[Concern] = []
    if prefers_rejected(start):
        concerns.append(Reason.START_PREFERS_REJECTED)  # what was learned is the wrong thing, however well
    if is_worse(start, now):
        concerns.append(Reason.WORSE_THAN_START)
    if no_ends or answers_run_on(now):
        concerns.append(Reason.ANSWERS_DO_NOT_END)
    fallen, drifted = fall(start, now), drift(now)
    if fallen is not None and not fallen <= MAX_FALL_NATS:
        concerns.append(Reason.CHOSEN_UNLIKELY)
    if drifted is not None and not drifted <= MAX_DRIFT_NATS:
        concerns.append(Reason.FAR_FROM_START)
    return Quality(
        concerns=concerns,
        held_out_rows=now.rows,
        start_loss=finite(start.loss),
        loss=finite(now.loss),
        change_error=finite(now.change_error),
        answer_ends=now.answer_ends,
        start_end_probability=finite(start.end_probability),
        end_probability=finite(now.end_probability),
        first_train_loss=finite(first_loss),
        steps_above_start=steps_above,
        unit=unit,
        fall=finite(fallen),
        drift=finite(drifted),
        rejected_likelier=finite(rejected_likelier(start)),
        start_figures=_finite_ones(start.figures),
        figures=_finite_ones(now.figures),
    )


def _finite_ones(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}
