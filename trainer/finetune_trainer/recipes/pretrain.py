"""Continued pre-training: learn to predict every token of plain text."""

from torch import Tensor

from finetune_trainer.inputs import Batch
from finetune_trainer.model import LanguageModel
from finetune_trainer.runplan import RunPlan


def loss_sum(lm: LanguageModel, batch: Batch) -> Tensor:
    """Sum of -log p(token | text before it) over all tokens but each row's first; scalar, nats."""
    return lm.nll_sum(batch)


def stop_token_ids(plan: RunPlan, model_stop_ids: list[int]) -> list[int]:
    """Text teaches no new end of an answer: what the base model stops at stays, besides the end of a document."""
    return list(dict.fromkeys([*plan.stop_token_ids, *model_stop_ids]))


def answer_end_ids(plan: RunPlan) -> list[int] | None:  # noqa: ARG001 (every method has it)
    """Return None: a text is no answer, and most of its pieces end nowhere."""
    return None
