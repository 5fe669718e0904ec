"""Singular values of a merge, calibrated by what the experts have in each direction."""

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.linalg import RESOLUTION, leading
from adamerge.rules.base import Correction, Stack
from adamerge.rules.matrices import TWO_AXES, Matrices, rounding


def calibrated(deltas: Tensor, change: Tensor, floor: float, name: str, least: float = 0.0) -> Tensor:
    """U γΣ Vᵀ of a merge U Σ Vᵀ [m, n] of experts [K, m, n]: see `Svc`. Rows of experts up to `least` are rounding."""
    left, values, right = leading(change, min(change.shape), name)
    merged = values.unsqueeze(1) * right
    total, count = torch.zeros_like(values), torch.zeros_like(values)
    basis, own = left.to(deltas.dtype), torch.empty_like(merged)
    for delta in deltas:
        own.copy_(basis.mT @ delta)
        squares = torch.linalg.vecdot(own, own)
        there = squares.sqrt() > max(least, RESOLUTION * float(squares.sum().sqrt()))
        ratio = torch.linalg.vecdot(merged, own) / torch.where(there, squares, 1)
        total += torch.where(there, ratio.clamp(min=floor), 0)
        count += there
    factor = torch.where(count > 0, count / torch.where(count > 0, total, 1), 1)
    return change.double() + left @ ((factor - 1).unsqueeze(1) * merged)


class Svc(Correction[None]):
    """Singular value calibration (arXiv:2602.05536): directions that experts share are counted once.

    A merged matrix U Σ Vᵀ has rows σᵢ vᵢᵀ in the basis U, where expert k has rows Aₖᵢ = uᵢᵀ Δₖ. The merge overshoots
    the expert by sᵢₖ = ⟨σᵢ vᵢ, Aₖᵢ⟩ / |Aₖᵢ|², and σᵢ becomes γᵢ σᵢ with γᵢ = K / Σₖ max(floor, sᵢₖ). Experts that have
    nothing but rounding in a direction do not count in it. The merge is taken with its scale, which cancels wherever no
    s is below the floor: the sum of the experts at any scale, and their mean, lead to the same matrices, and differ in
    all other tensors, which stay as they are.

    Args:
        floor: above 0, which bounds γ by 1/floor: at 1, singular values only become smaller, as the paper has it for
            `TsvM`.
        matrices: which tensors are matrices.
    """

    scaled = True

    def __init__(self, floor: float = 0.1, matrices: Matrices = TWO_AXES) -> None:
        if floor <= 0:
            raise InputError(f"expected floor > 0 in Svc, got {floor}")
        self.floor, self.matrices = floor, matrices

    def correct(self, stack: Stack, change: Tensor, statistics: None) -> Tensor:
        if not self.matrices.match(stack.name, stack.base.shape):
            return change
        matrix = calibrated(stack.deltas.flatten(2), change.flatten(1), self.floor, stack.name, rounding(stack))
        return matrix.view(change.shape).to(change.dtype)
