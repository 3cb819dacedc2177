"""Training methods, one flat file each."""

from typing import Protocol

from torch import Tensor

from finetune_api.job import MethodType
from finetune_trainer.inputs import Batch
from finetune_trainer.model import LanguageModel
from finetune_trainer.recipes import pretrain, sft
from finetune_trainer.runplan import RunPlan


class Recipe(Protocol):
    """What a method decides; its module has these functions."""

    def loss_sum(self, lm: LanguageModel, batch: Batch) -> Tensor:
        """Sum of the losses of a pass's label tokens, fp32 scalar; the loop divides by the step's label tokens."""
        ...

    def stop_token_ids(self, plan: RunPlan, model_stop_ids: list[int]) -> list[int]:
        """Tokens that end an answer of the tuned model."""
        ...

    def answer_end_ids(self, plan: RunPlan) -> list[int] | None:
        """Return the tokens whose probability at the end of held-out answers tells whether the model ends them.

        Empty where no answer ends with one; None for a method without answers.
        """
        ...


def recipe_of(method: MethodType) -> Recipe:
    """The module of a method."""
    match method:
        case MethodType.CPT:
            return pretrain
        case MethodType.SFT:
            return sft
