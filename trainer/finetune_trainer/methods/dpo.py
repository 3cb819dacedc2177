"""Direct preference optimisation: make the chosen answer of a pair likelier beside the rejected one.

Sigmoid: Rafailov et al. (2023, https://arxiv.org/abs/2305.18290), equation 7. IPO: Azar et al. (2023,
https://arxiv.org/abs/2310.12036), equation 17, over mean log-ratios of tokens, as its authors confirmed to TRL.
SimPO: Meng et al. (2024, https://arxiv.org/abs/2405.14734), equation 6, which needs no reference. Labels that may be
wrong: Mitchell, "A note on DPO with noisy preferences" (2023). The likelihood of the chosen answer beside
it: Pang et al. (2024, https://arxiv.org/abs/2404.19733), equation 1.

All results are (pairs,).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from finetune_api import defaults
from finetune_api.job import DpoLoss, DpoSpec, LossOn, MethodSpec, Schedule, TooLong
from finetune_trainer.data.examples import TokenRun, Tree, one_segment, pair_of
from finetune_trainer.data.kinds import PAIR, THUMB
from finetune_trainer.methods.method import Default, Method, answer_stop_token_ids
from finetune_trainer.methods.preference import (
    PAIR_FIGURES,
    Answers,
    first_of_each,
    minus_log_sigmoid,
    once,
    pairs_of,
    share_above,
    step_loss,
    with_losses,
)
from finetune_trainer.runplan import Denominator

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_trainer.inputs import Batch
    from finetune_trainer.policy import Scores
    from finetune_trainer.sizing import Choices

FIGURES = ("reward_accuracy", "reward_margin", *PAIR_FIGURES)


def _smoothed(margins: "Tensor", label_smoothing: float) -> "Tensor":
    """-log sigmoid(margin), of the label that is turned round with this probability."""
    if not label_smoothing:
        return minus_log_sigmoid(margins)  # 0 times the other side would be NaN where a margin is infinite
    return (1 - label_smoothing) * minus_log_sigmoid(margins) + label_smoothing * minus_log_sigmoid(-margins)


def sigmoid_losses(chosen: Answers, rejected: Answers, *, beta: float, label_smoothing: float) -> "Tensor":
    """Return -log sigmoid(β (log-ratio of the chosen answer - that of the rejected one))."""
    return _smoothed(beta * (chosen.ratios - rejected.ratios), label_smoothing)


def ipo_losses(chosen: Answers, rejected: Answers, *, beta: float) -> "Tensor":
    """Return (difference of the log-ratios, each a mean over its tokens, - 1 / 2β)²."""
    return (chosen.ratios / chosen.tokens - rejected.ratios / rejected.tokens - 1 / (2 * beta)) ** 2


def simpo_losses(chosen: Answers, rejected: Answers, *, beta: float, gamma: float, label_smoothing: float) -> "Tensor":
    """Return -log sigmoid(β (difference of the log-probabilities, each a mean over its tokens) - gamma)."""
    return _smoothed(beta * (chosen.means - rejected.means) - gamma, label_smoothing)


def chosen_nll(chosen: Answers) -> "Tensor":
    """Return what `nllWeight` is multiplied with: the mean negative log-likelihood of the chosen answer's tokens."""
    return -chosen.means


def _filled(spec: DpoSpec | None) -> DpoSpec:
    """Return the options with a value for each that the job leaves open."""
    given = spec or DpoSpec()
    loss = defaults.given(given.loss, DpoLoss(defaults.DPO_LOSS))
    beta = defaults.given(given.beta, defaults.SIMPO_BETA if loss is DpoLoss.SIMPO else defaults.DPO_BETA)
    return DpoSpec(
        loss=loss,
        beta=beta,
        gamma=defaults.given(given.gamma, defaults.SIMPO_GAMMA_SHARE * beta) if loss is DpoLoss.SIMPO else None,
        label_smoothing=None
        if loss is DpoLoss.IPO
        else defaults.given(given.label_smoothing, defaults.DPO_LABEL_SMOOTHING),
        nll_weight=defaults.given(given.nll_weight, defaults.DPO_NLL_WEIGHT),
    )


def _choose(spec: MethodSpec, choices: "Choices") -> MethodSpec:
    given, filled = spec.dpo or DpoSpec(), _filled(spec.dpo)
    choices.pick("method.dpo.loss", given.loss, filled.loss, "DPO as it was published")
    reason = "as its authors trained" if filled.loss is DpoLoss.SIMPO else "the usual middle between 0.01 and 0.5"
    choices.pick("method.dpo.beta", given.beta, filled.beta, reason)
    if filled.gamma is not None:
        choices.pick("method.dpo.gamma", given.gamma, filled.gamma, "half of beta, as its authors advise to begin with")
    return spec.model_copy(update={"dpo": filled})


def _losses(options: DpoSpec, scores: "Scores", batch: "Batch") -> "Tensor":
    chosen, rejected = pairs_of(scores, batch)
    beta, smoothing = options.beta or 0.0, options.label_smoothing or 0.0
    match options.loss:
        case DpoLoss.IPO:
            losses = ipo_losses(chosen, rejected, beta=beta)
        case DpoLoss.SIMPO:
            gamma = options.gamma or 0.0
            losses = simpo_losses(chosen, rejected, beta=beta, gamma=gamma, label_smoothing=smoothing)
        case _:
            losses = sigmoid_losses(chosen, rejected, beta=beta, label_smoothing=smoothing)
    return losses + options.nll_weight * chosen_nll(chosen) if options.nll_weight else losses


def _measures(options: DpoSpec, scores: "Scores", batch: "Batch") -> Mapping[str, "Tensor"]:
    """Rewards are β times the log-ratio, of SimPO times the mean log-probability."""
    pairs = pairs_of(scores, batch)
    chosen, rejected = (
        (options.beta or 0.0) * (each.means if options.loss is DpoLoss.SIMPO else each.ratios).detach()
        for each in pairs
    )
    return {
        "reward_accuracy": share_above(chosen - rejected),
        "reward_margin": chosen - rejected,
        **pairs.measures(),
    }


def _bound(method: Method, spec: MethodSpec) -> Method:
    options = _filled(spec.dpo)
    bound = with_losses(method, partial(_losses, options), partial(_measures, options))
    return replace(bound, needs_reference=options.loss is not DpoLoss.SIMPO)


def _examples(sequences: Sequence[TokenRun]) -> list[Tree]:
    """Return one example: both answers to a prompt, the chosen one first, or one that is paired later."""
    return [pair_of(*sequences) if len(sequences) > 1 else one_segment(*sequences[0])]


_OPTIONS = _filled(None)
DPO = Method(
    kinds=(PAIR, THUMB),
    labels=lambda _: LossOn.ASSISTANT,
    choose=_choose,
    examples=_examples,
    pairs=pair_of,
    too_long=TooLong(defaults.SFT_TOO_LONG),
    needs_end_token=False,
    longest_tokens=None,
    sequences=2,
    ranks=defaults.LORA_RANKS,
    epochs=once,
    schedule=Default(Schedule(defaults.PREFERENCE_SCHEDULE), "preference methods fall linearly to 0"),
    denominator=Denominator.EXAMPLES,
    learning_rate=Default(defaults.DPO_LEARNING_RATE, "ten times what is usual without LoRA"),
    loss=partial(step_loss, partial(_losses, _OPTIONS), partial(_measures, _OPTIONS)),
    losses=partial(_losses, _OPTIONS),
    figures=FIGURES,
    measures=partial(_measures, _OPTIONS),
    wanted=first_of_each,
    needs_reference=True,
    bound=_bound,
    stop_token_ids=answer_stop_token_ids,
    answer_end_ids=lambda plan: plan.stop_token_ids,
    name="direct preference optimisation",
    rows_name="pairs",
)
