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

# Linear layers that get no adapter, by `model_type`. In these mixtures PEFT takes layers of such names, which dense
# layers and shared experts have, for the experts, which are one tensor in transformers 5: it would adapt other weights.
_EXPERTS_W = frozenset({"gate", "w1", "w2", "w3"})
_EXPERTS_PROJ = frozenset({"gate", "gate_proj", "up_proj", "down_proj"})
_TAKEN_FOR_EXPERTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), _EXPERTS_W),
    **dict.fromkeys(
        ("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
         "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash",
         "mellum", "olmoe", "qwen3_moe", "qwen3_next", "sarvam_mla", "solar_open"),
        _EXPERTS_PROJ,
    ),
}  # fmt: skip
# Their state-space layers multiply with these weights themselves, past the layer that an adapter would be put beside.
_BYPASSED: dict[str, frozenset[str]] = {
    family: frozenset({"out_proj", "dt_proj"})
    for family in ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
}

# Of transformers' modeling_rope_utils: the frequencies are a function of the configuration alone.
_FIXED_ROPE_TYPES = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
_PHI3_ORIGINAL_TOKENS = 4096  # the default of its configuration


def not_adapted(family: str) -> frozenset[str]:
    """Return the names of linear layers that a model of this family has and LoRA is not put beside."""
    return _TAKEN_FOR_EXPERTS.get(family, frozenset()) | _BYPASSED.get(family, frozenset())


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
