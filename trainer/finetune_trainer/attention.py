"""Attention of packed rows: several rows lie one after another in one pass, and each sees only itself.

Registered with transformers under one name, so that the models' own code runs unchanged. Three ways to the same
result: one SDPA call per row (CPU), FlashAttention with cumulative lengths (CUDA, half precision), and a dense
block-diagonal mask (other devices and precisions; also the oracle in tests).
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "finetune_packed"
_MAX_FLASH_HEAD = 256


@dataclass(frozen=True)
class Segments:
    """Where rows begin and end in a packed pass of T tokens."""

    bounds: tuple[int, ...]  # (rows + 1,): row i is [bounds[i], bounds[i + 1])
    cumulative: Tensor  # the same as int32 on the model's device
    longest: int

    @cached_property
    def row_of_token(self) -> Tensor:
        """(T,) which row each token belongs to."""
        lengths = self.cumulative.diff()
        rows = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(rows, lengths, output_size=self.bounds[-1])

    @cached_property
    def dense_mask(self) -> Tensor:
        """(T, T) true where the query (first axis) may look at the key: same row, not later."""
        same_row = self.row_of_token[:, None] == self.row_of_token[None, :]
        return same_row.tril()


def _window_mask(mask: Tensor, window: int) -> Tensor:
    """Cut a causal (…, Q, K) mask to the last `window` keys, the query's own included."""
    return mask & ~torch.ones_like(mask).tril(-window)


def _per_row(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    """q (1, H, T, D), k and v (1, H, T, D) -> (1, H, T, D), one causal SDPA call per row."""
    outputs: list[Tensor] = []
    for begin, end in pairwise(segments.bounds):
        part = slice(begin, end)
        mask = None
        if window is not None and end - begin > window:
            mask = _window_mask(torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device).tril(), window)
        outputs.append(
            scaled_dot_product_attention(
                q[:, :, part], k[:, :, part], v[:, :, part], attn_mask=mask, is_causal=mask is None, scale=scale
            )
        )
    return torch.cat(outputs, dim=2)


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    """q (1, H, T, D), k and v (1, Hkv, T, D) -> (1, H, T, D) by FlashAttention over cumulative lengths."""
    out = varlen_attn(
        q[0].transpose(0, 1),
        k[0].transpose(0, 1),
        v[0].transpose(0, 1),
        segments.cumulative,
        segments.cumulative,
        segments.longest,
        segments.longest,
        scale=scale,
        # The window counts keys to the left of the query's own.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)[None]


def _dense(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    """q, k and v (1, H, T, D) -> (1, H, T, D) with a mask of T by T."""
    mask = segments.dense_mask if window is None else _window_mask(segments.dense_mask, window)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(1, Hkv, T, D) -> (1, H, T, D): SDPA's own grouping falls back to a slow kernel on the CPU."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def packed_attention(
    module: nn.Module,  # noqa: ARG001  transformers' calling convention
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D).

    Raises NotImplementedError for attention variants that these kernels would silently leave out.
    """
    for variant in ("softcap", "s_aux", "position_bias"):
        if other.get(variant) is not None:
            raise NotImplementedError(f"attention with {variant}")
    if attention_mask is not None or query.shape[2] != segments.bounds[-1]:
        raise NotImplementedError("attention masks and caches in a packed pass")
    half = query.dtype in (torch.bfloat16, torch.float16)
    head = query.shape[-1]
    if query.is_cuda and half and head % 8 == 0 and head <= _MAX_FLASH_HEAD and head == value.shape[-1]:
        out = _flash(query, key, value, segments, scaling, sliding_window)
    else:
        key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
        attend = _dense if query.is_cuda else _per_row
        out = attend(query, key, value, segments, scaling, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the name `PACKED` known to transformers; without a mask function it builds no mask for it."""
    AttentionInterface.register(PACKED, packed_attention)  # type: ignore[arg-type]
