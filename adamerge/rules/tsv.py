"""Singular vectors of the experts, made orthogonal to one another."""

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.linalg import COINCIDE, leading, polar
from adamerge.rules.base import Stack
from adamerge.rules.matrices import TWO_AXES, Matrices, MatrixRule, batches, rounding, side_by_side


def tsvm(deltas: Tensor, name: str, least: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """U⊥ Ŝ V⊥ᵀ of [K, m, n] -> [m, n]: see `TsvM`. Singular values up to `least` are 0; `weights` [K] scale them."""
    rank = max(1, min(deltas.shape[1:]) // len(deltas))
    left, values, right = zip(*(leading(delta, rank, name, least) for delta in batches(deltas)), strict=True)
    spectra = torch.cat(values)
    if weights is not None:
        spectra = weights.to(spectra).unsqueeze(1) * spectra
    lefts, _ = polar(side_by_side(torch.cat(left)), name, COINCIDE)
    rights, _ = polar(torch.cat(right).flatten(0, 1), name, COINCIDE)
    return (lefts * spectra.flatten()) @ rights


def outlier_weights(deltas: Tensor, threshold: float) -> Tensor:
    """[K], 1 on average: how much |Δₖ| sums to over entries that far above its mean, in standard deviations of |Δₖ|.

    For [K, m, n]; all 1 where no expert has such an entry.
    """
    sums = []
    for delta in deltas:
        sizes = delta.abs().double()
        sums.append(sizes[sizes > sizes.mean() + threshold * sizes.std(correction=0)].sum())
    each = torch.stack(sums)
    return each * (len(each) / each.sum()) if each.any() else torch.ones_like(each)


class TsvM(MatrixRule):
    """Task singular vectors (TSV-M, arXiv:2412.00081): the experts' leading directions, made orthogonal.

    Of each matrix Δₖ = Uₖ Sₖ Vₖᵀ the r/K largest singular values stay, at least one, r = min(m, n). With all that is
    left side by side, Û [m, r], Ŝ and V̂ [n, r], the merge is U⊥ Ŝ V⊥ᵀ, where U⊥ is the matrix with orthonormal
    columns that is nearest to Û, Û (ÛᵀÛ)^-½. The nuclear norm is the sum of the singular values kept. Scale 1 needs no
    search. All other tensors are averaged.

    Where the directions of several experts coincide, Û lacks rank, and (ÛᵀÛ)^-½ is taken over the directions that
    there are, with singular values from 10⁻³ on. Identical experts give that expert, cut to its largest r/K directions.

    Args:
        matrices: which tensors are matrices.
        outliers: weigh the experts anew in each matrix, Sₖ becoming wₖ Sₖ, after R-TSVM (arXiv:2502.06876): task
            vectors are heavy-tailed, and what a matrix has learned is in the tail. wₖ is proportional to the sum of
            |Δₖ| over entries more than so many standard deviations above their mean, and 1 on average; 3 is usual. An
            expert without such entries has no part in the matrix. The paper's other part, ranks that follow the
            sparsity of layers, is not here.
    """

    def __init__(self, matrices: Matrices = TWO_AXES, outliers: float | None = None) -> None:
        super().__init__(matrices)
        if outliers is not None and outliers <= 0:
            raise InputError(f"expected outliers > 0 in TsvM, got {outliers}")
        self.outliers = outliers

    def matrix(self, stack: Stack) -> Tensor:
        weights = None if self.outliers is None else outlier_weights(stack.deltas, self.outliers)
        return tsvm(stack.deltas, stack.name, rounding(stack), weights)
