"""Families that may be packed, each as its models really differ from a plain Llama, and with sliding windows."""

from typing import Any

import pytest

from finetune_trainer.families import PACKING_FAMILIES

# Something in each that a plain Llama does not have.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7},
}
WINDOW = {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = ("gemma3_text", "mistral", "phi3", "qwen2", "qwen3", "starcoder2")
CASES = [(family, SPECIAL.get(family, {})) for family in sorted(PACKING_FAMILIES)] + [(f, WINDOW) for f in WINDOWED]
EACH_CASE = pytest.mark.parametrize(
    ("family", "changes"), CASES, ids=[f"{f}{'-window' if c is WINDOW else ''}" for f, c in CASES]
)
