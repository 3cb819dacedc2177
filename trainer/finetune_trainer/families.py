"""Model families whose rows may share one forward pass, by `model_type` of config.json.

Each one passes `tests/unit/test_attention.py`: packed rows give the same log-probabilities and gradients as rows
alone. A family that is not named is trained one row per pass, if its head and attention pass the check at load.
"""

PACKING_FAMILIES = frozenset(
    {
        "cohere",
        "gemma",
        "gemma3_text",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)
