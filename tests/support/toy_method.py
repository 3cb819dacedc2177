"""A training method that no job can ask for: it shows that one file is all that a method is.

The loss of an example is softplus(-log p(answer) / tokens of the answer), which no sum over tokens gives.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from finetune_api.job import Schedule
from finetune_trainer.data.kinds import COMPLETION
from finetune_trainer.methods.method import Default, Loss
from finetune_trainer.methods.sft import SFT
from finetune_trainer.runplan import Denominator

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_trainer.inputs import Batch
    from finetune_trainer.policy import Scores


def _means(scores: "Scores", batch: "Batch") -> "Tensor":
    """(S,) mean log-probability of each answer's tokens."""
    return scores.sequences / scores.sequences.new_tensor(batch.label_counts)


def _losses(scores: "Scores", batch: "Batch") -> "Tensor":
    means = _means(scores, batch)
    return (-means).logaddexp(means.new_zeros(()))


def _loss(scores: "Scores", batch: "Batch") -> Loss:
    losses, means = _losses(scores, batch), _means(scores, batch)
    weights = losses.new_ones(len(losses)) if batch.example_weights is None else batch.example_weights
    return Loss((losses * weights).sum(), {"certainty": (means.exp() * weights).sum()})


def _epochs(rows: float) -> Default[float]:
    return Default(2.0, "a toy is played with twice")


TOY = replace(
    SFT,
    kinds=(COMPLETION,),
    ranks=(3, 5),
    epochs=_epochs,
    schedule=Default(Schedule.CONSTANT, "toys are all alike"),
    denominator=Denominator.EXAMPLES,
    loss=_loss,
    losses=_losses,
    figures=("certainty",),
    name="playing",
    rows_name="toys",
)
