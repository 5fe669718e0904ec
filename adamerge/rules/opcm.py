"""Continual merging: what joins a merge is orthogonal to what is in it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.deltas import dense
from adamerge.errors import InputError
from adamerge.kinds import kind
from adamerge.linalg import leading
from adamerge.rules.base import Folds, Rule, Stack
from adamerge.rules.matrices import LINEAR, Matrices
from adamerge.task_vectors import TaskVectors


def cleaned(delta: Tensor, change: Tensor, alpha: float, name: str) -> Tensor:
    """What is left of an expert [m, n] when it joins a merge U Σ Vᵀ [m, n]: see `Opcm`."""
    left, values, right = leading(change, min(change.shape), name)
    shares = values.cumsum(0) / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    leads = shares <= alpha
    taken = torch.where(leads & leads.unsqueeze(1), 1.0, torch.eye(len(leads), device=leads.device))
    left, right = left.to(delta.dtype), right.to(delta.dtype)
    own = left.T @ delta @ right.T
    return delta - left @ (taken.to(delta.dtype) * own) @ right


@dataclass(frozen=True)
class Rescaled:
    """The sums by name, and the factor that gives all of them together the length of an expert."""

    sums: dict[str, Tensor]
    factor: float


class Opcm(Rule[Rescaled | None], Folds):
    """Orthogonal projections for continual merging (OPCM, arXiv:2501.09522): experts join one after the other.

    In the basis of the merge so far, U Σ Vᵀ, the next expert is Q = Uᵀ Δ V. Its diagonal, and the block of the leading
    directions that make up at most α of Σ σ, are taken out, and U Q Vᵀ is added. All other tensors are added as they
    are. At the end, the whole merge is as long as the experts are on average. The order of the experts matters.

    Args:
        alpha: 0 ≤ α ≤ 1, the share of the singular values that is protected.
        rescale: to the mean length of the experts. The merge is then held in memory, for its length is needed first.
            Without, experts can join later (`Fold`, `fold`), and the scale is yours.
        matrices: which tensors are matrices.
    """

    def __init__(self, alpha: float = 0.5, rescale: bool = True, matrices: Matrices = LINEAR) -> None:
        if not 0 <= alpha <= 1:
            raise InputError(f"expected alpha from 0 to 1 in Opcm, got {alpha}")
        self.alpha, self.rescale, self.matrices = alpha, rescale, matrices

    def fit(self, task_vectors: TaskVectors) -> Rescaled | None:
        if not self.rescale:
            return None
        sums, squares = {}, torch.zeros(len(task_vectors.tasks), dtype=torch.float64)
        for name in task_vectors.deltas:
            base, compressed = task_vectors.piece(name)
            if kind(name, base) == "parameter":
                deltas = dense(compressed)
                norms = [float(torch.linalg.vector_norm(delta, dtype=torch.float64)) for delta in deltas]
                squares += torch.tensor(norms, dtype=torch.float64).square()
                sums[name] = self._sum(name, deltas)
        length = math.hypot(*(float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in sums.values()))
        return Rescaled(sums, float(squares.sqrt().mean()) / length if length > 0 else 1.0)

    def combine(self, stack: Stack, statistics: Rescaled | None) -> Tensor:
        if statistics is None:
            return self._sum(stack.name, stack.deltas)
        return statistics.factor * statistics.sums[stack.name]

    def add(self, change: Tensor, delta: Tensor, count: int, name: str) -> Tensor:
        if self.rescale:
            raise InputError("Opcm rescales all tensors at once: let experts join with Opcm(rescale=False)")
        return self._joined(name, change, delta)

    def _sum(self, name: str, deltas: Tensor) -> Tensor:
        change = deltas[0]
        for delta in deltas[1:]:
            change = self._joined(name, change, delta)
        return change

    def _joined(self, name: str, change: Tensor, delta: Tensor) -> Tensor:
        if not self.matrices.match(name, change.shape):
            return change + delta
        joining = cleaned(delta.flatten(1), change.flatten(1), self.alpha, name)
        return change + joining.view(change.shape)
