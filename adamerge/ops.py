"""The weighted sum behind every merge, and its gradient, for deltas in any form."""

import importlib.util
import os
from collections.abc import Sequence
from functools import cache

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
        ctx: torch.autograd.function.FunctionCtx, coefficients: Tensor, base: Tensor | None, deltas: AnyDeltas
    ) -> Tensor:
        ctx.deltas = deltas  # type: ignore[attr-defined]
        ctx.dtype = coefficients.dtype  # type: ignore[attr-defined]
        change = weighted(coefficients, deltas)
        return change if base is None else change.add_(base)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return inner(grad, ctx.deltas).to(ctx.dtype), None, None  # type: ignore[attr-defined]


def weighted_sum(coefficients: Tensor, base: Tensor | None, deltas: AnyDeltas) -> Tensor:
    """The merged tensor θ = θ₀ + Σₖ λₖ τₖ, differentiable in λ alone; G of them for G rows of λ.

    The gradient is ∂L/∂λₖ = ⟨∂L/∂θ, τₖ⟩, taken once the whole gradient of θ is there. No product λₖ τₖ is kept, so that
    memory does not grow with K beyond the deltas themselves.

    Args:
        coefficients: λ, [K] for one merged tensor or [G, K] for G.
        base: θ₀, [*shape], any; `None` is zero.
        deltas: τ, [K, *shape] or its compressed form, of the dtype of `base`; neither takes a gradient.

    Returns:
        [*shape] or [G, *shape].
    """
    merged: Tensor = _WeightedSum.apply(coefficients, base, deltas)
    return merged


def weighted_sums(
    coefficients: Sequence[Tensor], bases: Sequence[Tensor | None], deltas: Sequence[AnyDeltas]
) -> list[Tensor]:
    """`weighted_sum` of many tensors, each with its own coefficients [K].

    On a GPU, those whose deltas are there in float32, bfloat16 or 8 bits go through kernels that take them all at once;
    the results are the same up to rounding. ADAMERGE_KERNELS=0 in the environment turns that off.
    """
    merged: dict[int, Tensor] = {}
    fit = [n for n, pair in enumerate(zip(bases, deltas, strict=True)) if _in_kernels(*pair)]
    for learn in (True, False):  # apart, so that tensors whose coefficients stay take no gradient
        if together := [n for n in fit if coefficients[n].requires_grad == learn]:
            from adamerge import kernels

            rows = torch.stack([coefficients[n] for n in together])
            done = kernels.sums(rows, [bases[n] for n in together], [deltas[n] for n in together])
            merged.update(zip(together, done, strict=True))
    each = zip(coefficients, bases, deltas, strict=True)
    return [merged[n] if n in merged else weighted_sum(*arguments) for n, arguments in enumerate(each)]


def _in_kernels(base: Tensor | None, deltas: AnyDeltas) -> bool:
    if not (deltas.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1") or not _kernels():
        return False
    from adamerge import kernels

    return kernels.fits(base, deltas) and kernels.work(deltas.device)


@cache
def _kernels() -> bool:
    """Whether there is a Triton to run kernels, and nobody has turned them off."""
    return os.environ.get("ADAMERGE_KERNELS") != "0" and importlib.util.find_spec("triton") is not None


def column_sum(coefficients: Tensor, base: Tensor | None, deltas: AnyDeltas) -> Tensor:
    """θ = θ₀ + Σₖ τₖ ⊙ c_k with a coefficient per input column, differentiable in c alone.

    θ_ij = θ₀_ij + Σₖ c_jk τ_kij, and ∂L/∂c_jk = Σ_i ∂L/∂θ_ij τ_kij, over all axes but the second. One expert at a time
    is multiplied (a compressed one is made dense), and no product is kept for the backward pass.

    Args:
        coefficients: c, [J, K].
        base: θ₀, [*shape]; `None` is zero; it takes no gradient.
        deltas: τ, [K, *shape] or its compressed form, of two axes at least with J columns along the second, as the
            weights of linear layers and convolutions have their inputs; it takes no gradient either.

    Returns:
        [*shape].
    """
    merged: Tensor = _ColumnSum.apply(coefficients, base, deltas)
    return merged


class _ColumnSum(torch.autograd.Function):
    """As `_WeightedSum`, column by column."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, coefficients: Tensor, base: Tensor | None, deltas: AnyDeltas
    ) -> Tensor:
        ctx.deltas, ctx.dtype = deltas, coefficients.dtype  # type: ignore[attr-defined]
        merged = torch.zeros(deltas.shape[1:], dtype=deltas.dtype, device=deltas.device)
        if base is not None:
            merged.copy_(base)
        with torch.autocast(deltas.device.type, enabled=False):
            for scales, delta in zip(coefficients.to(deltas.dtype).unbind(1), deltas, strict=True):
                merged.addcmul_(delta, scales.view(-1, *[1] * (merged.dim() - 2)))
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        deltas: AnyDeltas = ctx.deltas  # type: ignore[attr-defined]
        grad, rows = grad.to(deltas.dtype), [axis for axis in range(grad.dim()) if axis != 1]
        with torch.autocast(deltas.device.type, enabled=False):
            sums = torch.stack([(grad * delta).sum(rows) for delta in deltas], 1)
        return sums.to(ctx.dtype), None, None  # type: ignore[attr-defined]
