"""Singular directions of all experts, superposed so that each expert's own response is kept."""

import torch
from torch import Tensor

from adamerge.linalg import COINCIDE, leading
from adamerge.rules.base import Stack
from adamerge.rules.matrices import MatrixRule, batches, rounding, side_by_side


def superposed(deltas: Tensor, name: str, least: float = 0.0) -> Tensor:
    """Σᵢ aᵢ uᵢ vᵢᵀ of [K, m, n] -> [m, n]: see `Stf`."""
    rank = max(1, min(deltas.shape[1:]) // len(deltas))
    found = [leading(delta, rank, name, least) for delta in batches(deltas)]
    left, values, right = (torch.cat(parts) for parts in zip(*found, strict=True))
    lefts, rights = side_by_side(left), right.flatten(0, 1)
    # Of rank-one matrices uᵢ vᵢᵀ, this is the Gram matrix: positive semidefinite, with ones on its diagonal.
    spectrum, basis = torch.linalg.eigh((lefts.T @ lefts) * (rights @ rights.T))
    inverse = torch.where(spectrum > COINCIDE, 1 / spectrum.clamp(min=COINCIDE), 0)
    weights = basis @ (inverse * (basis.T @ values.flatten()))
    return (lefts * weights) @ rights


class Stf(MatrixRule):
    """Superposed task-specific features (STF, arXiv:2502.10698): Σᵢ aᵢ uᵢ vᵢᵀ over the experts' leading directions.

    Each expert has its r/K largest singular triplets (uᵢ, σᵢ, vᵢ) of a matrix, at least one, r = min(m, n). The merge M
    answers each as that expert does, uᵢᵀ M vᵢ = σᵢ, which is a linear system for the coefficients:
    ((ÛᵀÛ) ∘ (V̂ᵀV̂)) a = σ. It is solved by least squares over eigenvalues above 10⁻³, which is where directions
    coincide: identical experts give that expert, cut to these triplets. All other tensors are averaged.
    """

    def matrix(self, stack: Stack) -> Tensor:
        return superposed(stack.deltas, stack.name, rounding(stack))
