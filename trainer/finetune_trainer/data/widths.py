"""How wide a model's layers are, which the memory of a pass is counted in: from config.json and the weights. Pure."""

from collections.abc import Collection, Mapping
from typing import Any, cast

from finetune_trainer.runplan import LayerWidths

# Names of one thing in the configurations of different families; the first that is there counts.
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv")
_MLP = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_top_k", "num_experts_per_token")


def layer_widths(
    config: Mapping[str, Any], hidden_size: int, layers: int, weights: Collection[list[int]]
) -> LayerWidths:
    """Return the widths of one layer. `weights`: shapes of the linear layers, for what the configuration leaves out."""
    heads = _number(config, *_HEADS)
    key_heads = 1 if config.get("multi_query") is True else _number(config, *_KEY_HEADS)
    head = _number(config, "head_dim") or (hidden_size // heads if heads else 0)
    query = heads * head if heads and head else hidden_size
    windowed = _windowed_layers(config, layers)
    return LayerWidths(
        query=query,
        key=key_heads * head if key_heads and head else query,
        mlp=_mlp(config) or max((max(shape) for shape in weights), default=4 * hidden_size),
        window=_number(config, "sliding_window") if windowed else None,
        windowed_layers=windowed,
    )


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first positive integer among the fields; of a list with one for each layer, the largest."""
    for name in names:
        value: Any = config.get(name)
        values = cast(list[Any], value) if isinstance(value, list) else [value]
        numbers = [each for each in values if type(each) is int and each > 0]
        if numbers:
            return max(numbers)
    return None


def _mlp(config: Mapping[str, Any]) -> int | None:
    """Return the width inside the MLP; of a mixture, all experts that one token passes through together."""
    dense = _number(config, *_MLP)
    chosen = _number(config, *_EXPERTS_PER_TOKEN)
    expert = _number(config, "moe_intermediate_size") or dense
    if chosen is None or expert is None:
        return dense
    shared = _number(config, "shared_expert_intermediate_size") or expert * (_number(config, "n_shared_experts") or 0)
    return max(dense or 0, chosen * expert + shared)


def _windowed_layers(config: Mapping[str, Any], layers: int) -> int:
    """Return how many layers look at the last tokens alone."""
    if _number(config, "sliding_window") is None or config.get("use_sliding_window") is False:
        return 0
    types: Any = config.get("layer_types")
    return cast(list[Any], types).count("sliding_attention") if isinstance(types, list) else layers
