"""The weighted sum behind every merge, and its gradient, for deltas in any form."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge.deltas import AnyDeltas, Deltas


def matrix(deltas: Tensor) -> Tensor:
    """[K, *shape] -> [K, numel]; also where `shape` is that of a scalar."""
    return deltas.unsqueeze(-1).flatten(1)


def weighted(coefficients: Tensor, deltas: AnyDeltas) -> Tensor:
    """Σₖ λₖ τₖ for coefficients [K] or [G, K] -> [*shape] or [G, *shape], in the dtype of the deltas; no gradient.

    Autocast is left out: small differences would be lost in the rounding of half precision.
    """
    with torch.no_grad(), torch.autocast(deltas.device.type, enabled=False):
        if isinstance(deltas, Deltas):
            return deltas.weighted(coefficients)
        flat, values = matrix(deltas), coefficients.to(deltas.dtype)
        product = torch.mv(flat.t(), values) if values.dim() == 1 else torch.mm(values, flat)
        return product.view((*coefficients.shape[:-1], *deltas.shape[1:]))


def inner(grad: Tensor, deltas: AnyDeltas) -> Tensor:
    """⟨grad, τₖ⟩ for a gradient [*shape] or [G, *shape] -> [K] or [G, K], in the dtype of the deltas; no gradient."""
    with torch.no_grad(), torch.autocast(deltas.device.type, enabled=False):
        if isinstance(deltas, Deltas):
            return deltas.inner(grad)
        flat, grad = matrix(deltas), grad.to(deltas.dtype)
        if grad.dim() < deltas.dim():
            return torch.mv(flat, grad.flatten())
        return torch.mm(matrix(grad), flat.t())


class _WeightedSum(torch.autograd.Function):
    """Saves no more than references to the frozen deltas: backward is one product with the incoming gradient."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, coefficients: Tensor, base: Tensor, deltas: AnyDeltas
    ) -> Tensor:
        ctx.deltas = deltas  # type: ignore[attr-defined]
        ctx.dtype = coefficients.dtype  # type: ignore[attr-defined]
        return weighted(coefficients, deltas).add_(base)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return inner(grad, ctx.deltas).to(ctx.dtype), None, None  # type: ignore[attr-defined]


def weighted_sum(coefficients: Tensor, base: Tensor, deltas: AnyDeltas) -> Tensor:
    """The merged tensor θ = θ₀ + Σₖ λₖ τₖ, differentiable in λ alone; G of them for G rows of λ.

    The gradient is ∂L/∂λₖ = ⟨∂L/∂θ, τₖ⟩, taken once the whole gradient of θ is there. No product λₖ τₖ is kept, so that
    memory does not grow with K beyond the deltas themselves.

    Args:
        coefficients: λ, [K] for one merged tensor or [G, K] for G.
        base: θ₀, any shape.
        deltas: τ, [K, *base.shape] or its compressed form, of the dtype of `base`; neither takes a gradient.

    Returns:
        [*base.shape] or [G, *base.shape].
    """
    merged: Tensor = _WeightedSum.apply(coefficients, base, deltas)
    return merged
