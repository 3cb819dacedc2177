"""Supervised fine-tuning: learn the answers of conversations; which tokens they are, the labels say.

The loss is that of pre-training (`likelihood`) over the answers alone: Ouyang et al., "Training language models to
follow instructions with human feedback" (2022, https://arxiv.org/abs/2203.02155), section 3.5.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune_api import defaults
from finetune_api.job import LossOn, MethodSpec, Schedule, SftSpec, TooLong
from finetune_trainer.data.examples import TokenRun, Tree, tree_of
from finetune_trainer.data.kinds import CHAT, COMPLETION
from finetune_trainer.methods.likelihood import likelihood_loss, token_losses
from finetune_trainer.methods.method import Default, Method, answer_stop_token_ids
from finetune_trainer.runplan import Denominator

if TYPE_CHECKING:
    from finetune_trainer.sizing import Choices


def _labels(spec: MethodSpec) -> LossOn:
    return defaults.given(spec.sft and spec.sft.loss_on, LossOn(defaults.LOSS_ON))


def _choose(spec: MethodSpec, choices: "Choices") -> MethodSpec:
    given, reason = spec.sft and spec.sft.loss_on, "the answers and the token that ends them"
    loss_on = choices.pick("method.sft.lossOn", given, LossOn(defaults.LOSS_ON), reason)
    return spec.model_copy(update={"sft": SftSpec(loss_on=loss_on)})


def _examples(sequences: Sequence[TokenRun]) -> list[Tree]:
    """Return one example: the answers of a conversation are learned in the same step, however they are unrolled."""
    return [tree_of(sequences)]


def _epochs(rows: float) -> Default[float]:
    epochs = min(max(3.0, 100 / rows), max(1.0, 25_000 / rows))
    epochs = round(min(max(epochs, float(defaults.MIN_EPOCHS)), float(defaults.MAX_EPOCHS)), 2)
    read = f"{round(rows):,} {'row' if rows == 1 else 'rows'}"
    return Default(epochs, f"{read}: 3 passes, more for fewer than 34 rows, fewer above 8,333")


SFT = Method(
    kinds=(CHAT, COMPLETION),
    labels=_labels,
    choose=_choose,
    examples=_examples,
    too_long=TooLong(defaults.SFT_TOO_LONG),
    needs_end_token=False,
    longest_tokens=None,
    ranks=defaults.LORA_RANKS,
    epochs=_epochs,
    schedule=Default(Schedule(defaults.SFT_SCHEDULE), "SFT falls linearly to 0"),
    denominator=Denominator.LABEL_TOKENS,
    loss=likelihood_loss,
    losses=token_losses,
    stop_token_ids=answer_stop_token_ids,
    answer_end_ids=lambda plan: plan.stop_token_ids,
    name="supervised fine-tuning",
    rows_name="rows",
)
