"""What a trained model is worth beside the model it began with: the figures, the concerns they raise, and the words.

The trainer measures and judges, as it alone has the figures of every row. Operator, command and model card say the same
of it: a concern never ends a job and is told apart from `Degraded`, which is about running.
"""

from typing import Literal, NamedTuple

from pydantic import Field

from finetune_api.base import Count, Str64, WireModel
from finetune_api.reasons import Reason

Concern = Literal[
    Reason.WORSE_THAN_START,
    Reason.ANSWERS_DO_NOT_END,
    Reason.DIVERGING,
    Reason.CHOSEN_UNLIKELY,
    Reason.FAR_FROM_START,
    Reason.START_PREFERS_REJECTED,
]

_TEXTS: dict[Reason, str] = {
    Reason.WORSE_THAN_START: "on {held_out_rows} held-out rows the loss is {loss} nats per {unit} after training "
    "and was {start_loss} before (standard error of the difference {change_error}): the model has become "
    "worse at this data. The adapter is kept, but try it before it serves anybody; train with a lower "
    "hyperparameters.learningRate or fewer hyperparameters.epochs",
    Reason.ANSWERS_DO_NOT_END: "at the {answer_ends} true ends of held-out answers the model gives the stop token a "
    "mean probability of {end_probability} (before training {start_end_probability}): its answers will run on "
    "until a length limit. Where the loss has become better, train for more hyperparameters.epochs, or choose a "
    "preprocessing.chatTemplate whose answers end with a stop token that the model knows",
    Reason.DIVERGING: "the training loss has been far above {first_train_loss}, where it began, for at least "
    "{steps_above_start} steps in a row; a lower hyperparameters.learningRate helps. Nothing was stopped",
    Reason.CHOSEN_UNLIKELY: "on {held_out_rows} held-out rows the answers to give have lost {fall} nats of "
    "log-probability per token: the model avoids the bad ones by writing neither. Try the adapter before it "
    "serves anybody; train with "
    "method.dpo.nllWeight, a higher beta, a lower hyperparameters.learningRate, or by SFT on the good answers first",
    Reason.FAR_FROM_START: "answers that have nothing to do with their prompt have become likelier by {drift} nats per "
    "token (the KL estimate of KTO): the model has moved far from the one it began with. Try the adapter before it "
    "serves anybody; train with a higher method.kto.beta or a lower hyperparameters.learningRate",
    Reason.START_PREFERS_REJECTED: "of {held_out_rows} held-out pairs the model that the job began with finds the "
    "rejected answer likelier, per token, in a share of {rejected_likelier}: are the columns swapped? `finetune data "
    "show` tells which answer of a row is which. Where they are swapped, write chosen: rejected and rejected: chosen "
    "below datasets[].columns of a new job, as this one learns the answers that were meant to be avoided; else the "
    "rows ask for what the model seldom writes, and all is well",
}
_NO_ENDS = (
    "no answer ends with a stop token, as the chat template writes none that the tokenizer has: nothing teaches the "
    "model where answers end, and they may run on until a length limit. Choose a preprocessing.chatTemplate whose "
    "answers end with a stop token, such as plain"
)


Unit = Literal["token", "example"]

MAX_FIGURES = 8  # of a method beside the loss; DPO has seven
WATCHED_FIGURE = "reward_accuracy"  # of those below what a line has room for
# All that methods measure beside the loss, in the order in which it is told. Rewards: see methods/.
FIGURE_WORDS = {
    "reward_accuracy": "share of preferences that the model shares",
    "reward_margin": "reward margin",
    "log_odds_ratio": "log odds ratio",
    "chosen_likelier": "share of pairs whose chosen answer is likelier per token",
    "chosen_logprob": "log-probability of chosen answers",
    "rejected_logprob": "log-probability of rejected answers",
    "good_logprob": "log-probability of good answers, bad ones counting as 0",
    "kl": "KL estimate",
    "chosen_tokens": "tokens of a chosen answer",
    "rejected_tokens": "tokens of a rejected answer",
    "good_tokens": "tokens of a good answer, bad ones counting as 0",
    "answer_tokens": "tokens of an answer",
    "new_loss": "loss on those that are new",
    "replayed_loss": "loss on those that are replayed",
}


class Quality(WireModel):
    """What was measured of the model, beside the model that the job began with. What is absent was not measured.

    Losses are in nats per `unit`; probabilities are means over the true ends of answers.
    """

    concerns: list[Concern] = Field(default_factory=list[Concern], max_length=6)  # the worst first
    held_out_rows: Count = 0
    start_loss: float | None = None
    loss: float | None = None
    change_error: float | None = None  # standard error of loss - start_loss, paired by row
    answer_ends: Count = 0  # stop tokens that were learned, in the held-out rows
    start_end_probability: float | None = None
    end_probability: float | None = None
    first_train_loss: float | None = None
    steps_above_start: Count = 0  # in a row up to the last step, with a loss far above the first
    unit: Unit = "token"  # what losses are means over
    fall: float | None = None  # of the log-probability of answers to give, since the start, nats per token
    drift: float | None = None  # estimate of the KL divergence from the start, nats per token
    rejected_likelier: float | None = None  # share of pairs in which the start finds the rejected answer likelier
    # Of preference methods, means over the held-out rows: before training, and now.
    start_figures: dict[Str64, float] = Field(default_factory=dict[str, float], max_length=MAX_FIGURES)
    figures: dict[Str64, float] = Field(default_factory=dict[str, float], max_length=MAX_FIGURES)

    @property
    def measured(self) -> bool:
        """Whether the model was compared with the one it began with; where that one's loss is no number, it was not."""
        return self.start_loss is not None or bool(self.concerns)


class Verdict(NamedTuple):
    """What a condition, a card or a command says about quality."""

    reason: Reason  # of the worst concern, else NoConcern or NotMeasured
    message: str


def verdict(quality: Quality) -> Verdict:
    """Return the reason and the words for what was measured; the words hold figures, never data."""
    if quality.concerns:
        return Verdict(quality.concerns[0], ". ".join(concern_words(quality)))
    if not quality.measured:
        why, field = "no rows were held out", "; see evaluation.holdoutFraction"
        if quality.held_out_rows:
            why, field = (
                f"the loss of the model before training is no number on {quality.held_out_rows:,} held-out rows",
                "",
            )
        text = f"{why}, so nothing says whether the model is better than the one it began with{field}"
        return Verdict(Reason.NOT_MEASURED, text)
    return Verdict(Reason.NO_CONCERN, figure_words(quality))


def concern_words(quality: Quality) -> list[str]:
    """Return a sentence for each concern: what was measured, and what to do."""
    shown = {
        name: _shown(value)
        for name, value in quality.model_dump(exclude={"concerns", "start_figures", "figures"}).items()
    }
    texts = _TEXTS if quality.answer_ends else _TEXTS | {Reason.ANSWERS_DO_NOT_END: _NO_ENDS}
    return [texts[concern].format_map(shown) for concern in quality.concerns]


def _shown(figure: float | str | None) -> str:
    if figure is None:
        return "unknown"
    if isinstance(figure, str):
        return figure
    return f"{figure:,}" if isinstance(figure, int) else f"{figure:.3f}"


def figure_words(quality: Quality) -> str:
    """Return what was measured, without judging it."""
    parts: list[str] = []
    if quality.loss is not None and quality.start_loss is not None:
        loss = f"loss {quality.loss:.3f} nats per {quality.unit}, {quality.start_loss:.3f} before training"
        parts.append(f"{quality.held_out_rows:,} held-out rows: {loss}")
    for name, words in FIGURE_WORDS.items():
        if name in quality.figures and name in quality.start_figures:
            parts.append(f"{words} {quality.figures[name]:.3f}, {quality.start_figures[name]:.3f} before training")
    if quality.end_probability is not None and quality.start_end_probability is not None:
        ends = f"mean probability of the stop token at {quality.answer_ends:,} true ends of answers"
        parts.append(f"{ends} {quality.end_probability:.3f}, {quality.start_end_probability:.3f} before training")
    elif quality.held_out_rows:
        parts.append("whether answers end was not measured: no stop token was learned in the held-out rows")
    return "; ".join(parts)


def meanings() -> dict[Reason, str]:
    """Return the sentences of every concern, with the places of its figures, for the page of reasons."""
    reason = Reason.ANSWERS_DO_NOT_END
    return _TEXTS | {reason: f"{_TEXTS[reason]}. Or: {_NO_ENDS}"}
