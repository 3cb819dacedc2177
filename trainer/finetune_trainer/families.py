"""Model families whose rows may share one forward pass, by `model_type` of config.json.

Each one passes `tests/unit/test_attention.py`: packed rows give the same log-probabilities and gradients as rows
alone. A family that is not named is trained one row per pass, if its head and attention pass the check at load.

Some rotary embeddings choose their frequencies by the longest row of a pass. Packed, such a row would change how its
neighbours are read, so rows that are read differently never share a pass: see `frequencies_change_after`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

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
# What the configuration of a mixture of experts calls their number.
MIXTURE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")

# Of transformers' modeling_rope_utils: the frequencies are a function of the configuration alone.
_FIXED_ROPE_TYPES = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
_PHI3_ORIGINAL_TOKENS = 4096  # the default of its configuration


def frequencies_change_after(config: Mapping[str, Any], family: str) -> int | None:
    """Return the length in tokens above which rows are read with other rotary frequencies; None if there is none.

    config: config.json. 0 stands for rope types that are not known here: no length is safe.
    """
    limits = [_changes_after(config, family, rope) for rope in _ropes(config)]
    return min((limit for limit in limits if limit is not None), default=None)


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rotary embeddings of a model: one, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):  # as transformers writes it from 5.0 on, and before
        found: Any = config.get(name)
        if isinstance(found, dict):
            rope = cast(dict[str, Any], found)
            nested = [cast(dict[str, Any], value) for value in rope.values() if isinstance(value, dict)]
            yield from nested or [rope]


def _changes_after(config: Mapping[str, Any], family: str, rope: Mapping[str, Any]) -> int | None:
    kind: Any = rope.get("rope_type", rope.get("type", "default"))
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # as its configuration does
    if isinstance(kind, str) and kind in _FIXED_ROPE_TYPES:
        return None
    names = ("original_max_position_embeddings", "max_position_embeddings")
    if kind == "longrope":
        default = _PHI3_ORIGINAL_TOKENS if family == "phi3" else None
        places = [config.get(names[0], default), rope.get(names[0]), config.get(names[1])]
    else:
        places = [config.get(names[1])] if kind == "dynamic" else []
    return next((place for place in places if isinstance(place, int) and place > 0), 0)
