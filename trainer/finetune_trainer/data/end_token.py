"""The token that ends texts and completions, which no chat template writes: the base must name one, and stop at it."""

from typing import TYPE_CHECKING

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.redact import shortened
from finetune_trainer.data.problems import place
from finetune_trainer.data.taught import named

if TYPE_CHECKING:  # which asks for the texts of rows, and so for their kinds
    from finetune_trainer.data.model_facts import Model


def require_end_token(model: "Model") -> None:
    """Raises BROKEN_MODEL when the tokenizer has no token to end a text with."""
    if model.tokenizer.eos_id is None:
        raise StageError(
            Fault.BROKEN_MODEL,
            uri=place(model.facts.uri),
            problem="its tokenizer names no eos_token, which must end every text",
        )


def require_stop_at_end_token(model: "Model") -> None:
    """Raises END_TOKEN_NO_STOP when the model does not stop at the token that ends its completions."""
    eos_id = model.tokenizer.eos_id
    if eos_id is not None and eos_id not in model.stop_ids:
        raise StageError(
            Fault.END_TOKEN_NO_STOP,
            uri=place(model.facts.uri),
            end=shortened(model.tokenizer.decode([eos_id]), 64),
            stops=named(model.stops),
        )
