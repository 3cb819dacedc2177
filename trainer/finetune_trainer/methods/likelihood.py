"""The loss of methods that learn tokens as they are: the negative log-likelihood of each label token.

Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018), equation 1, with the sign turned:
-Σ log p(token | tokens before it).
"""

from typing import TYPE_CHECKING

from finetune_trainer.methods.method import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from finetune_trainer.inputs import Batch
    from finetune_trainer.policy import Scores


def likelihood_loss(scores: "Scores", batch: "Batch") -> Loss:  # noqa: ARG001 (every method's has it)
    """Return the sum over the label tokens, each times its weight, by the fused head."""
    return Loss(scores.nll_sum(), {})


def token_losses(scores: "Scores", batch: "Batch") -> "Tensor":  # noqa: ARG001
    """Return the loss of each label token."""
    return -scores.tokens
