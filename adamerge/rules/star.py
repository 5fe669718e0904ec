"""Task vectors without the tail of their spectra."""

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.linalg import leading
from adamerge.rules.matrices import TWO_AXES, Matrices, MatrixTransform, batches


def star(delta: Tensor, keep: float, name: str) -> Tensor:
    """The fewest leading singular values that sum to `keep` of all, scaled to the sum of all; [..., m, n]."""
    left, values, right = leading(delta, min(delta.shape[-2:]), name)
    sums = values.cumsum(-1)
    before = sums - values
    kept = torch.where(before < keep * sums[..., -1:], values, 0)
    part = kept.sum(-1, keepdim=True)
    scaled = kept * (sums[..., -1:] / torch.where(part > 0, part, 1))
    return (left * scaled.unsqueeze(-2)) @ right


class Star(MatrixTransform):
    """Spectral truncation and rescaling (STAR, arXiv:2502.10339): matrices of τₖ without their weak directions.

    Of Δₖ = U S Vᵀ the fewest singular values stay that sum up to `keep` of the nuclear norm Σ σ, scaled so that this
    norm is what it was. The paper averages what is left: `[Star(), Mean()]`.

    Args:
        keep: 0 < keep ≤ 1, the share of the nuclear norm.
        matrices: which tensors are matrices.
    """

    def __init__(self, keep: float = 0.4, matrices: Matrices = TWO_AXES) -> None:
        super().__init__(matrices)
        if not 0 < keep <= 1:
            raise InputError(f"expected keep above 0 and up to 1 in Star, got {keep}")
        self.keep = keep

    def matrix(self, deltas: Tensor, name: str) -> Tensor:
        return torch.cat([star(delta, self.keep, name) for delta in batches(deltas)])
