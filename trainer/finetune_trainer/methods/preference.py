"""What methods have in common that learn which answers are preferred: pairs as they are scored, sums, and defaults."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from finetune_api import defaults
from finetune_trainer.methods.method import Default, Loss, Method

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_trainer.inputs import Batch
    from finetune_trainer.policy import Scores

PAIR_FIGURES = ("chosen_likelier", "chosen_logprob", "rejected_logprob", "chosen_tokens", "rejected_tokens")


class Answers(NamedTuple):
    """One answer of each pair: (pairs,) log-probabilities, now and of the model that the job began with, and tokens.

    Log-probabilities are in nats, summed over the answer's tokens; the reference's are 0 where the loss has none."""

    logprobs: "Tensor"
    reference: "Tensor"
    tokens: "Tensor"

    @property
    def ratios(self) -> "Tensor":
        """log of how many times as likely it is as it was."""
        return self.logprobs - self.reference

    @property
    def means(self) -> "Tensor":
        """The mean log-probability of a token."""
        return self.logprobs / self.tokens


class Pairs(NamedTuple):
    """Both answers of the pairs of a pass."""

    chosen: Answers
    rejected: Answers

    def measures(self) -> "dict[str, Tensor]":
        """Return what PAIR_FIGURES names, (pairs,) each."""
        chosen, rejected = self
        return {
            "chosen_likelier": share_above((chosen.means - rejected.means).detach()),
            "chosen_logprob": chosen.logprobs.detach(),
            "rejected_logprob": rejected.logprobs.detach(),
            "chosen_tokens": chosen.tokens,
            "rejected_tokens": rejected.tokens,
        }


def pairs_of(scores: "Scores", batch: "Batch") -> Pairs:
    """Return the pairs of a pass, whose examples are a chosen and a rejected answer each."""
    assert set(batch.example_counts) == {2}, "a pair has two answers"
    logprobs = scores.sequences
    reference = logprobs.new_zeros(len(logprobs)) if batch.reference is None else batch.reference
    tokens = logprobs.new_tensor(batch.label_counts)
    return Pairs(*(Answers(*(each[side::2] for each in (logprobs, reference, tokens))) for side in (0, 1)))


def minus_log_sigmoid(x: "Tensor") -> "Tensor":
    """-log sigmoid(x), exact for any x."""
    return (-x).logaddexp(x.new_zeros(()))


def share_above(x: "Tensor") -> "Tensor":
    """1 where x is above 0, and a half where it is 0: a tie is half right."""
    return (x.sign() + 1) / 2


def summed(losses: "Tensor", measures: Mapping[str, "Tensor"], batch: "Batch") -> Loss:
    """Return the sums over the examples of a pass, each times its weight. losses, measures: (examples,)."""
    weights = batch.example_weights
    if weights is None:
        return Loss(losses.sum(), {name: each.sum() for name, each in measures.items()})
    return Loss((losses * weights).sum(), {name: (each * weights).sum() for name, each in measures.items()})


def step_loss(
    losses: Callable[["Scores", "Batch"], "Tensor"],
    measures: Callable[["Scores", "Batch"], Mapping[str, "Tensor"]],
    scores: "Scores",
    batch: "Batch",
) -> Loss:
    """Return the sums of a pass, from what gives the losses of its examples, and what is measured of each."""
    return summed(losses(scores, batch), measures(scores, batch), batch)


def with_losses(
    method: Method,
    losses: Callable[["Scores", "Batch"], "Tensor"],
    measures: Callable[["Scores", "Batch"], Mapping[str, "Tensor"]],
) -> Method:
    """Return the method with these losses of examples, of which the step's is the sum, and what is measured of each."""
    return replace(method, loss=partial(step_loss, losses, measures), losses=losses, measures=measures)


def first_of_each(batch: "Batch") -> Sequence[bool]:
    """(sequences,) whether it is the first of its example: the chosen answer of a pair."""
    return [place == 0 for count in batch.example_counts for place in range(count)]


def once(rows: float) -> Default[float]:  # noqa: ARG001 (every method's has it)
    """One pass over the data."""
    return Default(defaults.PREFERENCE_EPOCHS, "preferences are read once: they are soon learned by heart")
