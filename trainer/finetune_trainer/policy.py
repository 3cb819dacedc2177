"""What the model says of the label tokens of one pass: log-probabilities of tokens and of sequences, differentiable.

A method's loss is a function of them. `nll_sum` is the fast path of losses that are a sum over tokens: its gradient is
made in the same pass, where `tokens` computes each tile of logits again in backward.
"""

from functools import cached_property

import torch
from torch import Tensor

from finetune_trainer.inputs import Batch
from finetune_trainer.model import LanguageModel


class Scores:
    """The scores of one pass. What is not asked for is not computed, and tokens are scored once."""

    def __init__(self, lm: LanguageModel, batch: Batch) -> None:
        self._lm, self._batch = lm, batch

    def nll_sum(self) -> Tensor:
        """Return the sum of the label tokens' negative log-likelihoods, each times its weight: fp32 scalar, nats."""
        return self._lm.nll_sum(self._batch)

    @cached_property
    def tokens(self) -> Tensor:
        """(N,) log p(label token | all before it), fp32, in nats."""
        return self._lm.token_logprobs(self._batch)

    @cached_property
    def sequences(self) -> Tensor:
        """(S,) sum of `tokens` of each flat sequence; 0 for one without labels.

        What sequences of a tree share is scored in the first of them alone, as it is learned there."""
        parts = self.tokens.split(list(self._batch.label_counts))
        return torch.stack([part.sum() for part in parts])
