"""A shift that all experts share, learned from their matrices alone."""

from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import dense
from adamerge.errors import InputError
from adamerge.linalg import leading
from adamerge.rules.adam import adam
from adamerge.rules.base import Rule, Stack
from adamerge.rules.matrices import LINEAR, Matrices, batches, rounding, side_by_side
from adamerge.rules.ties import Trim
from adamerge.task_vectors import TaskVectors


def common_directions(deltas: Tensor, count: int, name: str, least: float = 0.0) -> Tensor:
    """[m, count]: the leading left directions of the r/K leading ones of each expert, for deltas [K, m, n]."""
    rank = max(1, min(deltas.shape[1:]) // len(deltas))
    left = torch.cat([leading(delta, rank, name, least)[0] for delta in batches(deltas)])
    return leading(side_by_side(left), count, name)[0]


def shared_shift(deltas: Tensor, weights: Tensor, fixed: Tensor, steps: int, lr: float) -> Tensor:
    """Adam on Σⱼ Σᵣ ⟨Δⱼᵣ, Δⱼᵣ − Σₖ λₖ (Δₖᵣ + S)⟩² over rows r, from S = 0, off the directions `fixed` [m, q]."""
    gap = deltas.square().sum(2) - (deltas * torch.tensordot(weights, deltas, 1)).sum(2)

    def gradient(shift: Tensor) -> Tensor:
        products = gap - weights.sum() * torch.einsum("kmn,mn->km", deltas, shift)
        slope = -2 * weights.sum() * torch.einsum("km,kmn->mn", products, deltas)
        return slope - fixed @ (fixed.T @ slope)

    return adam(torch.zeros_like(deltas[0]), gradient, steps, lr)


class Doge(Rule[Tensor | None]):
    """Adaptive projective gradient descent (DOGE-TA, arXiv:2501.01230): Σₖ λₖ (Δₖ + S) ∘ maskₖ, S shared by all.

    Each matrix has λₖ = η / |Δₖ| and a shift S, which makes the merge agree with every expert along that expert's own
    rows: min Σⱼ Σᵣ ⟨Δⱼᵣ, Δⱼᵣ − Σₖ λₖ (Δₖᵣ + S)⟩², by Adam. Its gradient is projected off the directions that the
    experts share, the leading min(m, n)/`subspace` ones of their leading singular vectors side by side. Masks keep the
    largest entries of each Δₖ over all matrices, as `Trim` does. All other tensors stay the base's. Needs no scale.

    Args:
        eta: η > 0, the length of each expert in a matrix.
        keep: 0 < keep ≤ 1, the share of entries that masks keep.
        subspace: how many times fewer than min(m, n) the directions are that stay as they are.
        steps: of Adam.
        lr: its learning rate, about how far an entry moves per step.
        matrices: which tensors are matrices.
    """

    def __init__(
        self,
        eta: float = 0.07,
        keep: float = 0.3,
        subspace: float = 6.0,
        steps: int = 400,
        lr: float = 1e-4,
        matrices: Matrices = LINEAR,
    ) -> None:
        if min(eta, lr) <= 0 or min(subspace, steps) < 1:
            given = f"{eta}, {lr}, {subspace} and {steps}"
            raise InputError(f"expected eta and lr above 0, subspace and steps from 1 on in Doge, got {given}")
        self._trim = Trim(keep)
        self.eta, self.subspace, self.steps, self.lr, self.matrices = eta, subspace, steps, lr, matrices

    def fit(self, task_vectors: TaskVectors) -> Tensor | None:
        """The smallest magnitude that each expert keeps."""
        names = task_vectors.deltas
        others = [name for name in names if not self.matrices.match(name, meta(task_vectors.base, name).shape)]
        return self._trim.fit(task_vectors.without(others))

    def combine(self, stack: Stack, statistics: Tensor | None) -> Tensor:
        if not self.matrices.match(stack.name, stack.base.shape) or not bool(stack.deltas.any()):
            return torch.zeros_like(stack.base)
        deltas = stack.deltas.flatten(2)
        norms = torch.linalg.vector_norm(deltas, dim=(1, 2))
        weights = torch.where(norms > 0, self.eta / torch.where(norms > 0, norms, 1), 0)
        count = int(min(deltas.shape[1:]) / self.subspace)
        fixed = common_directions(deltas, count, stack.name, rounding(stack)).to(deltas.dtype)
        shift = shared_shift(deltas, weights, fixed, self.steps, self.lr)
        kept: Any = dense(self._trim.tensor(stack.name, deltas, statistics)) != 0
        merged = torch.tensordot(weights, torch.where(kept, deltas + shift, 0), 1)
        return merged.view(stack.base.shape)
