"""Linear layers whose weights differ from group to group of a batch: W_g = W₀ + Σₖ w_gk τₖ."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge import ops
from adamerge.deltas import AnyDeltas, LowRank

#: Bytes of composed weights that exist at a time. Larger chunks were not faster on a CPU, where they leave the cache.
CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}


def routed_linear(
    x: Tensor,
    routing: Tensor,
    weight: tuple[Tensor, AnyDeltas | None],
    bias: tuple[Tensor, AnyDeltas | None] | None = None,
    transposed: bool = False,
) -> Tensor:
    """y_g = x_g W_gᵀ + b_g with W_g = W₀ + Σₖ w_gk τₖ: exact, without a loop over groups.

    Weights are composed for a chunk of groups at a time, and once more in the backward pass, so that memory does not
    grow with the number of groups; only x and w are saved. The gradient is that of x and w alone. Low-rank deltas are
    never composed: y_g = x_g W₀ᵀ + (w_g ⊙ (x_g Vᵀ)) Uᵀ.

    Args:
        x: [G, M, I], the M rows (samples × tokens) of every group.
        routing: w, [G, K].
        weight: W₀ [O, I] and its deltas [K, O, I], or of any shape [K, O, ...] with as many elements; no deltas where
            no expert changed it.
        bias: b₀ [O] and its deltas [K, O].
        transposed: W₀ and its deltas are [I, O] and [K, I, O].

    Returns:
        [G, M, O].
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # as for torch's own layers
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        routing = routing.to(weight[0].dtype)
        rows = None if bias is None else routed_rows(routing, *bias).to(x.dtype)
        matrix, deltas = weight
        if deltas is None or isinstance(deltas, LowRank):
            y = F.linear(x, (matrix.T if transposed else matrix).to(x.dtype))
            y = y if deltas is None else y + _factored(x, routing, deltas, transposed)
        else:
            y = _RoutedLinear.apply(x, routing, matrix, deltas, transposed)
        return y if rows is None else y + rows.unsqueeze(1)


def routed_rows(routing: Tensor, bias: Tensor, deltas: AnyDeltas | None) -> Tensor:
    """[G, O] vectors b₀ + Σₖ w_gk τₖ, one per group."""
    return bias.expand(len(routing), -1) if deltas is None else ops.weighted_sum(routing, bias, deltas)


def _factored(x: Tensor, routing: Tensor, deltas: LowRank, transposed: bool) -> Tensor:
    """Σₖ w_gk x_g τₖᵀ through the factors τₖ = Uₖ Vₖ, of which neither is composed."""
    left, right = deltas.left.to(x.dtype), deltas.right.to(x.dtype)  # [K, m, r], [K, r, n]
    into, out = (left.mT, right.mT) if transposed else (right, left)
    rank = into.shape[1]
    inner = F.linear(x, into.flatten(0, 1))  # [G, M, K r]
    inner = inner * routing.to(x.dtype).repeat_interleave(rank, 1).unsqueeze(1)
    return F.linear(inner, out.transpose(0, 1).flatten(1))


class _RoutedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Tensor, weight: Tensor, deltas: AnyDeltas, transposed: bool) -> Any:
        ctx.save_for_backward(x, routing)
        ctx.frozen = weight, deltas, transposed
        return torch.cat(
            [torch.bmm(x[part], _compose(routing[part], ctx.frozen, x.dtype).mT) for part in _chunks(x, weight)]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, routing = ctx.saved_tensors
        weight, deltas, transposed = ctx.frozen
        grads_x, grads_routing = [], []
        for part in _chunks(x, weight):
            if ctx.needs_input_grad[0]:
                grads_x.append(torch.bmm(grad[part], _compose(routing[part], ctx.frozen, x.dtype)))
            if ctx.needs_input_grad[1]:
                outer = torch.bmm(x[part].mT, grad[part]) if transposed else torch.bmm(grad[part].mT, x[part])
                outer = outer.to(weight.dtype).reshape(len(outer), *deltas.shape[1:])
                grads_routing.append(ops.inner(outer, deltas))
        return _cat(grads_x), _cat(grads_routing), None, None, None


def _compose(routing: Tensor, frozen: tuple[Tensor, AnyDeltas, bool], dtype: torch.dtype) -> Tensor:
    """[g, O, I] weights of a chunk of groups."""
    weight, deltas, transposed = frozen
    composed = ops.weighted(routing, deltas).reshape(len(routing), *weight.shape).add_(weight).to(dtype)
    return composed.mT if transposed else composed


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    budget = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cpu"])
    size = max(1, budget // (weight.numel() * weight.element_size()))
    return [slice(start, start + size) for start in range(0, len(x), size)] or [slice(0, 0)]


def _cat(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None
