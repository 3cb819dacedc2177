"""Kahneman-Tversky optimisation: learn from answers that are each good or bad, without pairs.

Ethayarajh et al. (2024, https://arxiv.org/abs/2402.01306), section 4.1. z0, where gain turns into loss, is the mean
log-ratio of answers to prompts that are not theirs, at least 0; no gradient goes through it. It is taken over the whole
step, where the paper and TRL take it over a micro-batch, and the answers of prompts are exchanged as the plan says
(`mismatched`). Weights of good and bad answers: section 4.2, where both count alike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from finetune_api import defaults
from finetune_api.errors import StageError
from finetune_api.job import MAX_ANSWER_WEIGHT, KtoSpec, MethodSpec
from finetune_api.reasons import Fault
from finetune_trainer.data.examples import TokenRun, Tree, one_segment
from finetune_trainer.data.kinds import THUMB
from finetune_trainer.methods.dpo import DPO
from finetune_trainer.methods.method import Method
from finetune_trainer.methods.preference import share_above, with_losses

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_trainer.inputs import Batch
    from finetune_trainer.policy import Scores
    from finetune_trainer.sizing import Choices

FIGURES = ("reward_accuracy", "reward_margin", "kl", "good_logprob", "good_tokens", "answer_tokens")


def reference_point(drift: "Tensor") -> "Tensor":
    """Return z0. drift: () mean log-ratio of answers under other prompts, over a whole global step."""
    return drift.detach().clamp(min=0.0)


def kto_losses(
    ratios: "Tensor",
    desirable: "Tensor",
    z0: "Tensor",
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> "Tensor":
    """Return λ_D sigmoid(β (z0 - log-ratio)) of good answers, λ_U sigmoid(β (log-ratio - z0)) of bad ones.

    ratios: (answers,) log of how many times as likely each is as it was; desirable: (answers,) bool."""
    gains = beta * (ratios - z0)
    good, bad = desirable_weight * (-gains).sigmoid(), undesirable_weight * gains.sigmoid()
    return good.where(desirable, bad)


def _filled(spec: KtoSpec | None) -> KtoSpec:
    """Return the options with a value for each that the job leaves open."""
    given = spec or KtoSpec()
    return KtoSpec(
        beta=defaults.given(given.beta, defaults.KTO_BETA),
        desirable_weight=given.desirable_weight or 1.0,
        undesirable_weight=given.undesirable_weight or 1.0,
    )


def _choose(spec: MethodSpec, choices: "Choices") -> MethodSpec:
    given = spec.kto or KtoSpec()
    beta = choices.pick("method.kto.beta", given.beta, defaults.KTO_BETA, "as its authors trained")
    return spec.model_copy(update={"kto": given.model_copy(update={"beta": beta})})


def _settle(spec: MethodSpec, columns: Mapping[str, npt.NDArray[Any]], choices: "Choices") -> MethodSpec:
    """Balance good and bad answers: both kinds count alike, however many there are of each, as in section 4.2.

    Raises ONE_SIDED_THUMBS where there are only good ones or only bad ones."""
    label = columns["label"]
    good, bad = int((label > 0).sum()), int((label < 0).sum())
    if not good or not bad:
        raise StageError(Fault.ONE_SIDED_THUMBS, good=good, bad=bad)
    given = spec.kto or KtoSpec()
    desirable, undesirable = _balanced(given, bad / good)
    alike = math.isclose(desirable * good, undesirable * bad)
    how = "alike" if alike else "as nearly alike as weights may make them"
    reason = f"{good:,} good and {bad:,} bad answers count {how}"
    choices.pick("method.kto.desirableWeight", given.desirable_weight, desirable, reason)
    choices.pick("method.kto.undesirableWeight", given.undesirable_weight, undesirable, reason)
    update = {"desirable_weight": desirable, "undesirable_weight": undesirable}
    return spec.model_copy(update={"kto": given.model_copy(update=update)})


def _balanced(given: KtoSpec, bad_per_good: float) -> tuple[float, float]:
    """Return the weights of good and of bad answers; what is not given lets both kinds count alike, within bounds."""
    desirable, undesirable = given.desirable_weight, given.undesirable_weight
    if desirable is None:
        desirable = max(1.0, bad_per_good) if undesirable is None else undesirable * bad_per_good
    if undesirable is None:
        undesirable = desirable / bad_per_good
    return min(desirable, MAX_ANSWER_WEIGHT), min(undesirable, MAX_ANSWER_WEIGHT)


def _ratios(scores: "Scores", batch: "Batch") -> "Tensor":
    assert batch.reference is not None, "KTO compares with the model that the job began with"
    return scores.sequences - batch.reference


def _losses(options: KtoSpec, scores: "Scores", batch: "Batch") -> "Tensor":
    assert batch.desirable is not None, "each answer is good or bad"
    assert batch.drift is not None, "z0 is of the whole step"
    return kto_losses(
        _ratios(scores, batch),
        batch.desirable,
        reference_point(batch.drift),
        beta=options.beta or 0.0,
        desirable_weight=options.desirable_weight or 1.0,
        undesirable_weight=options.undesirable_weight or 1.0,
    )


def _measures(options: KtoSpec, scores: "Scores", batch: "Batch") -> Mapping[str, "Tensor"]:
    """An answer is judged right where a good one's reward is above 0, as it was before training, or a bad one's below.

    reward_margin: of a good answer its reward, of a bad one what it has lost; good_…: 0 of bad answers."""
    ratios = _ratios(scores, batch).detach()
    assert batch.desirable is not None
    assert batch.drift is not None
    rightly = (options.beta or 0.0) * ratios.where(batch.desirable, -ratios)
    good, tokens = batch.desirable.float(), ratios.new_tensor(batch.label_counts)
    return {
        "reward_accuracy": share_above(rightly),
        "reward_margin": rightly,
        "kl": reference_point(batch.drift).expand(len(ratios)),
        "good_logprob": good * scores.sequences.detach(),
        "good_tokens": good * tokens,
        "answer_tokens": tokens,
    }


def _bound(method: Method, spec: MethodSpec) -> Method:
    options = _filled(spec.kto)
    return with_losses(method, partial(_losses, options), partial(_measures, options))


def _examples(sequences: Sequence[TokenRun]) -> list[Tree]:
    """Return one example: a prompt and its answer."""
    (sequence,) = sequences
    return [one_segment(*sequence)]


def _good(batch: "Batch") -> Sequence[bool]:
    assert batch.desirable is not None
    return batch.desirable.tolist()


_OPTIONS = _filled(None)
KTO = replace(
    with_losses(DPO, partial(_losses, _OPTIONS), partial(_measures, _OPTIONS)),
    kinds=(THUMB,),
    choose=_choose,
    settle=_settle,
    examples=_examples,
    pairs=None,
    sequences=1,
    figures=FIGURES,
    wanted=_good,
    needs_drift=True,
    bound=_bound,
    name="Kahneman-Tversky optimisation",
    rows_name="rated answers",
)
