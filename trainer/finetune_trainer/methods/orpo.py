"""Odds ratio preference optimisation: learn the chosen answer, and make its odds larger than the rejected one's.

Hong et al. (2024, https://arxiv.org/abs/2403.07691), equations 3 to 7: no reference. The likelihood is that of the
answer, as in the paper; TRL's covers the prompt too.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from finetune_api import defaults
from finetune_api.job import MethodSpec, OrpoSpec
from finetune_trainer.methods.dpo import DPO
from finetune_trainer.methods.method import Default, Method
from finetune_trainer.methods.preference import PAIR_FIGURES, minus_log_sigmoid, pairs_of, share_above, with_losses

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_trainer.inputs import Batch
    from finetune_trainer.policy import Scores
    from finetune_trainer.sizing import Choices

FIGURES = ("reward_accuracy", "log_odds_ratio", *PAIR_FIGURES)
_LOG_HALF = -0.6931471805599453
_SURE = -1e-7  # log-probability above which fp32 knows no chance of anything else, and odds would be infinite


def _log1mexp(x: "Tensor") -> "Tensor":
    """log(1 - e^x) for x ≤ 0 without losing digits; the form not taken never sees values it has no slope at.

    An answer that the model is sure of, which has no finite odds, is taken for one that it is nearly sure of."""
    near = x.clamp(min=_LOG_HALF, max=_SURE).expm1().neg().log()
    far = x.clamp(max=_LOG_HALF).exp().neg().log1p()
    return near.where(x > _LOG_HALF, far)


def log_odds_ratios(chosen_means: "Tensor", rejected_means: "Tensor") -> "Tensor":
    """Return log (odds of the chosen answer / odds of the rejected one), (pairs,); arguments as in `orpo_losses`."""
    return chosen_means - _log1mexp(chosen_means) - (rejected_means - _log1mexp(rejected_means))


def orpo_losses(chosen_means: "Tensor", rejected_means: "Tensor", *, weight: float) -> "Tensor":
    """Return -log P(chosen) + λ · -log sigmoid(log of the odds ratio), (pairs,), in nats.

    chosen_means, rejected_means: (pairs,) log P, the mean over an answer's tokens; weight: λ."""
    return -chosen_means + weight * minus_log_sigmoid(log_odds_ratios(chosen_means, rejected_means))


def _weight(spec: MethodSpec) -> float:
    return defaults.given(spec.orpo and spec.orpo.lambda_, defaults.ORPO_LAMBDA)


def _choose(spec: MethodSpec, choices: "Choices") -> MethodSpec:
    weight, reason = _weight(spec), "as its authors trained; the odds ratio only guides what the answers teach"
    choices.pick("method.orpo.lambda", spec.orpo and spec.orpo.lambda_, weight, reason)
    return spec.model_copy(update={"orpo": OrpoSpec.model_validate({"lambda": weight})})


def _losses(weight: float, scores: "Scores", batch: "Batch") -> "Tensor":
    chosen, rejected = pairs_of(scores, batch)
    return orpo_losses(chosen.means, rejected.means, weight=weight)


def _measures(scores: "Scores", batch: "Batch") -> Mapping[str, "Tensor"]:
    pairs = pairs_of(scores, batch)
    ratios = log_odds_ratios(pairs.chosen.means, pairs.rejected.means).detach()
    return {"reward_accuracy": share_above(ratios), "log_odds_ratio": ratios, **pairs.measures()}


def _bound(method: Method, spec: MethodSpec) -> Method:
    return with_losses(method, partial(_losses, _weight(spec)), _measures)


ORPO = replace(
    with_losses(DPO, partial(_losses, defaults.ORPO_LAMBDA), _measures),
    choose=_choose,
    learning_rate=Default(defaults.ORPO_LEARNING_RATE, "higher than DPO's, as it learns the answers themselves too"),
    figures=FIGURES,
    needs_reference=False,
    bound=_bound,
    name="odds ratio preference optimisation",
)
