"""Merges whose singular values are all the same."""

from torch import Tensor

from adamerge.linalg import polar
from adamerge.rules.base import Stack
from adamerge.rules.matrices import MatrixRule, rounding


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
        return isotropic(stack.deltas.double().sum(0), stack.name, rounding(stack))
