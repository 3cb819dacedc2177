"""Model FLOPs of a step and the peak of the GPU: the two sides of model FLOPs utilisation (MFU). Pure.

Counted as in PaLM (https://arxiv.org/abs/2204.02311, appendix B): 6N + 12·L·h·T per token. For each weight that is 2
forward, 2 for the gradient of the activations and 2 for the gradient of the weight; 12·L·h·T is attention over T
tokens in L layers of width h. With LoRA the same way of counting gives

    4·N + 6·A + 12·L·h·T   per token, and   4·H   per label token

as frozen weights have no gradient; N: weights of the layers, A: of the adapter, H: of the head, which is multiplied
at label positions only (see logprobs.py); embeddings are looked up. T is the length of the token's own row. As in
PaLM causality is not discounted, and recomputed activations do not count.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

# Dense bf16 FLOP/s with fp32 sums, by words of the device's name; the first line whose words are all in it counts.
# From NVIDIA's data sheets, which print twice as much where "with sparsity", of A100, H100, H200, B200, L4, L40, L40S,
# A10, and for the RTX cards from its architecture white papers GA102 (appendix A) and Ada (appendix A and B).
_PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364e12),
    ("RTX 4090", 165e12),
    ("RTX A6000", 155e12),
    ("RTX 3090", 71e12),
)
_OTHER_CHIPS = {"MIG", "Laptop", "D"}  # a slice of the GPU, or a slower one that is called like it


def peak_flops(device_name: str) -> float | None:
    """What a GPU does at most, in dense bf16 FLOP/s; None for one that is not in the table."""
    words = set(re.split(r"[\s-]+", device_name))
    if words & _OTHER_CHIPS:
        return None
    return next((peak for name, peak in _PEAKS if words.issuperset(name.split())), None)


@dataclass(frozen=True)
class ModelSize:
    """What a model multiplies with."""

    layer_weights: int
    head_weights: int
    adapter_weights: int
    layers: int
    width: int


def step_flops(
    size: ModelSize, row_lengths: Sequence[int], label_tokens: int, computed: Sequence[int] | None = None
) -> int:
    """Model FLOPs of a step on rows of these lengths, in tokens. computed: of each, how many are; None: all."""
    own = row_lengths if computed is None else computed
    tokens, pairs = sum(own), sum(length * count for length, count in zip(row_lengths, own, strict=True))
    per_token = 4 * size.layer_weights + 6 * size.adapter_weights
    attention = 12 * size.layers * size.width * pairs
    return per_token * tokens + attention + 4 * size.head_weights * label_tokens
