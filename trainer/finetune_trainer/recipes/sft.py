"""Supervised fine-tuning: learn the answers of conversations; which tokens they are, the labels say."""

from torch import Tensor

from finetune_trainer.inputs import Batch
from finetune_trainer.model import LanguageModel
from finetune_trainer.runplan import RunPlan


def loss_sum(lm: LanguageModel, batch: Batch) -> Tensor:
    """Sum of -log p(token | conversation before it) over the learned tokens; scalar, nats."""
    return lm.nll_sum(batch)


def stop_token_ids(plan: RunPlan, model_stop_ids: list[int]) -> list[int]:
    """The tokens that training put at the end of answers; an answer ends nowhere else."""
    return plan.stop_token_ids or model_stop_ids


def answer_end_ids(plan: RunPlan) -> list[int] | None:
    """The tokens that training put at the end of answers; none if the chat template writes none."""
    return plan.stop_token_ids
