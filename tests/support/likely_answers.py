"""How likely answers are to a base model, with an adapter or alone, as transformers and PEFT alone load them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

Messages = list[dict[str, Any]]


class Reader:
    """Reads conversations. The tokenizer is the adapter's own, as one who serves it takes it from there."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(adapter or base)
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()

    @torch.no_grad()
    def logprob(self, prompt: Messages, answer: Messages) -> float:
        """Return the log-probability of what the template writes of the answer, in nats."""
        before, whole = (
            self._tokenizer.apply_chat_template(said, return_dict=False, **options)
            for said, options in ((prompt, {"add_generation_prompt": True}), ([*prompt, *answer], {}))
        )
        ids = torch.tensor([whole])
        scores = self._model(ids).logits[0, :-1].log_softmax(-1)
        return float(scores.gather(1, ids[0, 1:, None])[len(before) - 1 :].sum())


def share_preferred(base: Path, adapter: Path, pairs: Sequence[dict[str, Any]]) -> float:
    """Return of how many pairs the adapter has made the chosen answer likelier beside the rejected one."""
    before, after = Reader(base, None), Reader(base, adapter)
    gains = [
        [reader.logprob(row["prompt"], row["chosen"]) - reader.logprob(row["prompt"], row["rejected"]) for row in pairs]
        for reader in (before, after)
    ]
    return sum(now > then for then, now in zip(*gains, strict=True)) / len(pairs)
