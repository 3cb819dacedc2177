"""Attention of packed rows: several rows lie one after another in one pass, and each sees only itself.

A row may begin with tokens of the row before it, as two answers to one prompt do: these lie in the pass once, and it
sees them as if they were its own (tree attention). As rows are in the order of a tree's leaves, each shares its
beginning with the one before it or with none.

Registered with transformers under one name, so that the models' own code runs unchanged. Three ways to the same
result: SDPA calls row by row (CPU), FlashAttention with cumulative lengths (CUDA, half precision), and a dense
block-diagonal mask (other devices and precisions, where nothing is shared; also the oracle in tests).
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "finetune_packed"
_MAX_FLASH_HEAD = 256
# Queries behind a shared beginning that are masked at once: a mask has as many rows, and as many columns as the
# longest row has tokens and it has rows.
_QUERY_BLOCK = 512


class Keys(NamedTuple):
    """What the rows of a pass see, one behind another, on the model's device."""

    places: Tensor  # (K,) int64, of each token in the pass
    cumulative: Tensor  # (rows + 1,) int32: row i sees places[cumulative[i]:cumulative[i + 1]]


@dataclass(frozen=True)
class Segments:
    """Where rows begin and end in a packed pass of T tokens."""

    bounds: tuple[int, ...]  # (rows + 1,): row i is [bounds[i], bounds[i + 1]), behind what it shares
    cumulative: Tensor  # the same as int32 on the model's device
    longest: int  # tokens of a row, with what it shares
    shared: tuple[int, ...] = ()  # (rows,) tokens of the row before, as it begins, that a row begins with; (): none do
    keys: Keys | None = None  # where rows share
    _masks: dict[int | None, Tensor] = field(default_factory=dict[int | None, Tensor], init=False, compare=False)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, with what they share counted in each."""
        return self.bounds[-1] + sum(self.shared)

    @cached_property
    def row_of_token(self) -> Tensor:
        """(T,) which row each token belongs to."""
        lengths = self.cumulative.diff()
        rows = torch.arange(len(lengths), device=lengths.device)
        return torch.repeat_interleave(rows, lengths, output_size=self.bounds[-1])

    @cached_property
    def dense_mask(self) -> Tensor:
        """(T, T) true where the query (first axis) may look at the key: same row, not later. No row shares."""
        same_row = self.row_of_token[:, None] == self.row_of_token[None, :]
        return same_row.tril()

    def block_mask(self, queries: int, before: int, window: int | None, like: Tensor) -> Tensor:
        """(queries, before + queries) 0 where a query may look at the key, else -inf, behind so many other keys.

        It is cut out of one mask, so that all layers and rows keep the same memory for their gradients."""
        if window not in self._masks:
            rows = min(_QUERY_BLOCK, self.longest)
            shape = (rows, self.longest + rows)
            seen = torch.ones(shape, dtype=torch.bool, device=like.device).tril(self.longest)
            if window is not None:
                seen &= ~torch.ones_like(seen).tril(self.longest - window)
            self._masks[window] = torch.zeros(shape, dtype=like.dtype, device=like.device).masked_fill_(
                ~seen, -torch.inf
            )
        begin = self.longest - before
        return self._masks[window][:queries, begin : begin + before + queries]


def _window_mask(mask: Tensor, window: int) -> Tensor:
    """Cut a causal (…, Q, K) mask to the last `window` keys, the query's own included."""
    return mask & ~torch.ones_like(mask).tril(-window)


def _per_row(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    """q (1, H, T, D), k and v (1, H, T, D) -> (1, H, T, D), one causal SDPA call per row, some for one that shares."""
    lengths = [end - begin for begin, end in pairwise(segments.bounds)]
    outputs: list[Tensor] = []
    keys = values = k[:, :, :0]
    for row, (own_q, own_k, own_v) in enumerate(zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)):
        shared = segments.shared[row] if segments.shared else 0
        if shared:
            keys = torch.cat([keys[:, :, :shared], own_k], dim=2)
            values = torch.cat([values[:, :, :shared], own_v], dim=2)
            outputs.extend(_behind(own_q, keys, values, segments, scale, window))
            continue
        keys, values = own_k, own_v
        mask = None
        if window is not None and lengths[row] > window:
            mask = _window_mask(
                torch.ones(lengths[row], lengths[row], dtype=torch.bool, device=q.device).tril(), window
            )
        outputs.append(
            scaled_dot_product_attention(own_q, own_k, own_v, attn_mask=mask, is_causal=mask is None, scale=scale)
        )
    return torch.cat(outputs, dim=2)


def _behind(
    q: Tensor, keys: Tensor, values: Tensor, segments: Segments, scale: float | None, window: int | None
) -> list[Tensor]:
    """Return the attention of a row's own queries, a block of them at a time, over all keys up to each."""
    shared = keys.shape[2] - q.shape[2]
    outputs: list[Tensor] = []
    for block in q.split(_QUERY_BLOCK, dim=2):
        known = shared + block.shape[2]
        mask = segments.block_mask(block.shape[2], shared, window, q)
        outputs.append(
            scaled_dot_product_attention(block, keys[:, :, :known], values[:, :, :known], attn_mask=mask, scale=scale)
        )
        shared = known
    return outputs


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None) -> Tensor:
    """q (1, H, T, D), k and v (1, Hkv, T, D) -> (1, H, T, D) by FlashAttention over cumulative lengths.

    Rows that share see more keys than they have queries: the kernel aligns both at their ends."""
    keys, values, cumulative = k[0].transpose(0, 1), v[0].transpose(0, 1), segments.cumulative
    if segments.keys is not None:
        places, cumulative = segments.keys
        keys, values = keys[places], values[places]
    out = varlen_attn(
        q[0].transpose(0, 1),
        keys,
        values,
        segments.cumulative,
        cumulative,
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
        attend = _dense if query.is_cuda and not segments.shared else _per_row
        out = attend(query, key, value, segments, scaling, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the name `PACKED` known to transformers; without a mask function it builds no mask for it."""
    AttentionInterface.register(PACKED, packed_attention)  # type: ignore[arg-type]
