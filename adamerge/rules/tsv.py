"""Singular vectors of the experts, made orthogonal to one another."""

import torch
from torch import Tensor

from adamerge.linalg import COINCIDE, leading, polar
from adamerge.rules.base import Stack
from adamerge.rules.matrices import MatrixRule, batches, rounding, side_by_side


def tsvm(deltas: Tensor, name: str, least: float = 0.0) -> Tensor:
    """U⊥ Ŝ V⊥ᵀ of [K, m, n] -> [m, n]: see `TsvM`. Singular values up to `least` are 0."""
    rank = max(1, min(deltas.shape[1:]) // len(deltas))
    left, values, right = zip(*(leading(delta, rank, name, least) for delta in batches(deltas)), strict=True)
    lefts, _ = polar(side_by_side(torch.cat(left)), name, COINCIDE)
    rights, _ = polar(torch.cat(right).flatten(0, 1), name, COINCIDE)
    return (lefts * torch.cat(values).flatten()) @ rights


class TsvM(MatrixRule):
    """Task singular vectors (TSV-M, arXiv:2412.00081): the experts' leading directions, made orthogonal.

    Of each matrix Δₖ = Uₖ Sₖ Vₖᵀ the r/K largest singular values stay, at least one, r = min(m, n). With all that is
    left side by side, Û [m, r], Ŝ and V̂ [n, r], the merge is U⊥ Ŝ V⊥ᵀ, where U⊥ is the matrix with orthonormal
    columns that is nearest to Û, Û (ÛᵀÛ)^-½. The nuclear norm is the sum of the singular values kept. Scale 1 needs no
    search. All other tensors are averaged.

    Where the directions of several experts coincide, Û lacks rank, and (ÛᵀÛ)^-½ is taken over the directions that
    there are, with singular values from 10⁻³ on. Identical experts give that expert, cut to its largest r/K directions.
    """

    def matrix(self, stack: Stack) -> Tensor:
        return tsvm(stack.deltas, stack.name, rounding(stack))
