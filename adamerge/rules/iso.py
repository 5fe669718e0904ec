"""Merges whose singular values are all the same."""

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.linalg import COINCIDE, leading, polar
from adamerge.rules.base import Stack
from adamerge.rules.matrices import TWO_AXES, Matrices, MatrixRule, batches, rounding, side_by_side, total


def isotropic(matrix: Tensor, name: str, least: float = 0.0) -> Tensor:
    """U Vᵀ times the mean of the singular values above `least`, [m, n]."""
    factor, values = polar(matrix, name, least)
    return values.sum() / (values > 0).sum().clamp(min=1) * factor


class IsoC(MatrixRule):
    """Isotropic merging in the common subspace (Iso-C, arXiv:2502.04959): Σₖ Δₖ = U Σ Vᵀ becomes mean(σ) U Vᵀ.

    All directions of the sum are then as strong as they are on average; the nuclear norm stays. Directions that are
    mere rounding of the weights (experts of low rank leave many) are no part of it. All other tensors are averaged.
    Scales of 1 to 1.5 are usual.
    """

    def matrix(self, stack: Stack) -> Tensor:
        return isotropic(total(stack.deltas), stack.name, rounding(stack))


def iso_cts(deltas: Tensor, common: float, name: str, least: float = 0.0) -> Tensor:
    """Of [K, m, n], the common directions of the sum and each expert's own, all equally strong: see `IsoCts`."""
    rank = min(deltas.shape[1:])
    own = round((rank - int(common * rank)) / len(deltas))
    shared = leading(total(deltas), rank - own * len(deltas), name, least)
    basis = shared[0]
    exact = (delta.double() for delta in batches(deltas))
    found = [leading(delta - basis @ (basis.mT @ delta), own, name, least) for delta in exact]
    left, values, right = (torch.cat(parts) for parts in zip(*found, strict=True))
    lefts, _ = polar(torch.cat([side_by_side(left), basis], 1), name, COINCIDE)
    rights, _ = polar(torch.cat([right.flatten(0, 1), shared[2]]), name, COINCIDE)
    spectrum = torch.cat([values.flatten(), shared[1]])
    return spectrum.sum() / (spectrum > 0).sum().clamp(min=1) * lefts @ rights


class IsoCts(MatrixRule):
    """Isotropic merging in common and task-specific subspaces (Iso-CTS, arXiv:2502.04959).

    Of the r = min(m, n) directions of a matrix, each expert has p = (1 − common) r / K, rounded, of its own, and
    c = r − pK are common: the leading ones of Σₖ Δₖ = U Σ Vᵀ. An expert's own are the leading ones of what the common
    ones lack of it, Δₖ − U_c U_cᵀ Δₖ. All of them, side by side, are made orthogonal as in `TsvM`, and each is as
    strong as they are on average. Directions that are mere rounding, or that coincide, are no part of it.

    Args:
        common: the share of common directions, from 0 to 1; at 1 the merge is that of `IsoC`.
        matrices: which tensors are matrices. All others are averaged.
    """

    def __init__(self, common: float = 0.8, matrices: Matrices = TWO_AXES) -> None:
        super().__init__(matrices)
        if not 0 <= common <= 1:
            raise InputError(f"expected common from 0 to 1 in IsoCts, got {common}")
        self.common = common

    def matrix(self, stack: Stack) -> Tensor:
        return iso_cts(stack.deltas, self.common, stack.name, rounding(stack))
