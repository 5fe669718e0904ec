"""The weighted sum behind every merge, and its gradient."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def matrix(deltas: Tensor) -> Tensor:
    """[K, *shape] -> [K, numel]; also where `shape` is that of a scalar."""
    return deltas.unsqueeze(-1).flatten(1)


class _WeightedSum(torch.autograd.Function):
    """Saves no more than references to the frozen deltas: backward is one product with the incoming gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, coefficients: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
        ctx.deltas = deltas  # type: ignore[attr-defined]
        ctx.dtype = coefficients.dtype  # type: ignore[attr-defined]
        flat = matrix(deltas)
        return torch.mv(flat.t(), coefficients.to(flat.dtype)).view_as(base).add_(base)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        flat = matrix(ctx.deltas)  # type: ignore[attr-defined]
        return torch.mv(flat, grad.flatten()).to(ctx.dtype), None, None  # type: ignore[attr-defined]


def weighted_sum(coefficients: Tensor, base: Tensor, deltas: Tensor) -> Tensor:
    """The merged tensor θ = θ₀ + Σₖ λₖ τₖ, differentiable in λ alone.

    The gradient is ∂L/∂λₖ = ⟨∂L/∂θ, τₖ⟩, taken once the whole gradient of θ is there. No product λₖ τₖ is kept, so that
    memory does not grow with K beyond the deltas themselves.

    Args:
        coefficients: λ, [K].
        base: θ₀, any shape.
        deltas: τ, [K, *base.shape], of the dtype of `base`; neither takes a gradient.
    """
    merged: Tensor = _WeightedSum.apply(coefficients, base, deltas)
    return merged
