"""The loss head: log-probabilities of label tokens without the full logits.

Only label positions are projected, in tiles, with fp32 results. `nll_sum` makes its gradient in the same pass, as in
Liger Kernel (https://arxiv.org/abs/2410.10989); `token_logprobs` computes each tile again in backward, as only then it
is known how much each token counts. Both need a frozen head. Full logits would cost 10 bytes per token and entry of
the vocabulary and are never held.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_TILE_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}  # fp32 logits of one tile; the CPU's fits its cache hierarchy


def _tiles(rows: int, head: Tensor) -> Iterator[slice]:
    """Slices of label positions whose fp32 logits fit the tile size."""
    size = max(16, _TILE_BYTES.get(head.device.type, _TILE_BYTES["cuda"]) // (4 * head.shape[0]))
    for begin in range(0, rows, size):
        yield slice(begin, min(begin + size, rows))


def _logits(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """hidden (n, h), head (V, h) -> (n, V) fp32, summed in fp32 also for half-precision inputs."""
    if head.is_cuda and head.dtype != torch.float32:
        logits = torch.mm(hidden, head.t(), out_dtype=torch.float32)
    else:
        logits = torch.mm(hidden, head.t()).float()
    return logits if bias is None else logits.add_(bias)


def _require_frozen(head: Tensor, bias: Tensor | None) -> None:
    """Assert that no gradient is wanted which neither function below would give."""
    trained = head.requires_grad or (bias is not None and bias.requires_grad)
    assert not trained, "the head is trained, and would get no gradient here"


class _NllSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        weights: Tensor | None,
    ) -> Tensor:
        """Sum of the negative log-likelihoods, fp32 scalar, and beside it the gradient of `hidden`."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for tile in _tiles(len(targets), head):
            logits = _logits(hidden[tile] * scale, head, bias)
            target = targets[tile, None]
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            losses = normaliser - logits.gather(1, target)
            total += (losses if weights is None else losses * weights[tile, None]).sum()
            probabilities = logits.sub_(normaliser).exp_()
            probabilities.scatter_add_(1, target, probabilities.new_full((1, 1), -1.0).expand_as(target))
            if weights is not None:
                probabilities *= weights[tile, None]
            torch.mm(probabilities.to(head.dtype), head, out=gradient[tile])
            del logits, probabilities  # else the next tile is made beside this one
        ctx.save_for_backward(gradient.mul_(scale))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, scale: float) -> Tensor:
        """(n,) log-probabilities; of the logits only the normalisers are kept."""
        result = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalisers = torch.empty_like(result)
        for tile in _tiles(len(targets), head):
            logits = _logits(hidden[tile] * scale, head, bias)
            normalisers[tile] = logits.logsumexp(dim=1)
            result[tile] = logits.gather(1, targets[tile, None])[:, 0] - normalisers[tile]
            del logits  # else the next tile is made beside this one
        ctx.save_for_backward(hidden, head, bias, targets, normalisers)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        hidden, head, bias, targets, normalisers = ctx.saved_tensors
        gradient = torch.empty_like(hidden)
        for tile in _tiles(len(targets), head):
            logits = _logits(hidden[tile] * ctx.scale, head, bias)
            # Of log p(target): 1 at the target, less the probabilities.
            wanted = logits.sub_(normalisers[tile, None]).exp_().neg_()
            wanted.scatter_add_(1, targets[tile, None], wanted.new_ones((1, 1)).expand(len(wanted), 1))
            wanted *= upstream[0][tile, None]
            torch.mm(wanted.to(head.dtype), head, out=gradient[tile])
            del logits, wanted
        return gradient.mul_(ctx.scale), None, None, None, None


def nll_sum(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum over label positions of -log p(target), fp32 scalar in nats, differentiable in `hidden`.

    weights: (n,) fp32, what each position's term is multiplied with; None: with 1.

    hidden: (n, h) states that predict `targets` (n,) int64; head: (V, h) frozen, of hidden's dtype; bias: (V,).
    logits = scale · hidden · headᵀ + bias.
    """
    _require_frozen(head, bias)
    result = _NllSum.apply(hidden.to(head.dtype), head, bias, targets, scale, weights)
    assert isinstance(result, Tensor)
    return result


def token_logprobs(hidden: Tensor, head: Tensor, bias: Tensor | None, targets: Tensor, scale: float = 1.0) -> Tensor:
    """(n,) fp32 log p(target) in nats, differentiable in `hidden`; arguments as in `nll_sum`."""
    _require_frozen(head, bias)
    result = _TokenLogprobs.apply(hidden.to(head.dtype), head, bias, targets, scale)
    assert isinstance(result, Tensor)
    return result
