"""Continued pre-training: learn to predict every token of plain text.

The loss is that of pre-training (`likelihood`) over all tokens but each piece's first: Gururangan et al., "Don't Stop
Pretraining" (2020, https://arxiv.org/abs/2004.10964), section 3. The schedule warms up again and falls along a cosine
to a tenth: Ibrahim et al. (2024, https://arxiv.org/abs/2403.08763).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from finetune_api import defaults
from finetune_api.job import LossOn, MethodSpec, Schedule, TooLong
from finetune_api.text_quality import QualityPreset
from finetune_trainer.data.examples import TokenRun, Tree, one_segment
from finetune_trainer.data.kinds import TEXT
from finetune_trainer.methods.likelihood import likelihood_loss, token_losses
from finetune_trainer.methods.method import Default, Method
from finetune_trainer.runplan import Denominator, RunPlan

if TYPE_CHECKING:
    from finetune_trainer.sizing import Choices


def _examples(pieces: Sequence[TokenRun]) -> list[Tree]:
    """Return an example for each piece of a text that is split: a step need not read all of a book."""
    return [one_segment(*piece) for piece in pieces]


def _choose(spec: MethodSpec, _: "Choices") -> MethodSpec:
    """Choose nothing: there are no options."""
    return spec


def _stop_token_ids(plan: RunPlan, model_stop_ids: list[int]) -> list[int]:
    """Text teaches no new end of an answer: what the base model stops at stays, besides the end of a document."""
    return list(dict.fromkeys([*plan.stop_token_ids, *model_stop_ids]))


CPT = Method(
    kinds=(TEXT,),
    labels=lambda _: LossOn.ALL,
    choose=_choose,
    examples=_examples,
    too_long=TooLong(defaults.CPT_TOO_LONG),
    quality_preset=QualityPreset.DOCUMENTS,
    drops_near_copies=True,
    needs_end_token=True,
    longest_tokens=defaults.TEXT_SEQUENCE_LENGTH,
    ranks=defaults.CPT_LORA_RANKS,
    epochs=lambda _: Default(1.0, "continued pre-training reads each text once"),
    schedule=Default(Schedule(defaults.CPT_SCHEDULE), "continued pre-training falls along a cosine"),
    denominator=Denominator.LABEL_TOKENS,
    loss=likelihood_loss,
    losses=token_losses,
    stop_token_ids=_stop_token_ids,
    answer_end_ids=lambda _: None,  # a text is no answer, and most of its pieces end nowhere
    name="continued pre-training",
    rows_name="texts or pieces of texts",
)
