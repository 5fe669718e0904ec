"""Rules that are linear in the task vectors."""

from pathlib import Path

import torch
from torch import Tensor

from adamerge.coefficients import CoefficientTable, read_coefficients
from adamerge.deltas import dense
from adamerge.errors import InputError
from adamerge.ops import column_sum, matrix
from adamerge.rules.base import Folds, Rule, Stack, WeightRule, parameters
from adamerge.rules.weights import Weights, check_count, per_task, shares, weighted_sum
from adamerge.task_vectors import TaskVectors


class TaskArithmetic(Rule[None], Folds):
    """Task arithmetic (arXiv:2212.04089): Σₖ τₖ, to be scaled by one number (0.3 for the field's eight CLIP tasks)."""

    elementwise = True

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        return stack.deltas.sum(0)

    def add(self, change: Tensor, delta: Tensor, count: int, name: str) -> Tensor:
        return change + delta


class Mean(Rule[None], Folds):
    """Simple averaging: (1/K) Σₖ τₖ, which is the mean of the experts' weights at scale 1."""

    elementwise = True

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        return stack.deltas.mean(0)

    def merged(self, stack: Stack, statistics: None, scale: float) -> Tensor:
        # Exact wherever Σₖ θₖ is; base + mean(τ) would round twice.
        experts = len(stack.tasks)
        mean = (experts * stack.base + stack.deltas.sum(0)) / experts
        return torch.lerp(stack.base, mean, scale)

    def add(self, change: Tensor, delta: Tensor, count: int, name: str) -> Tensor:
        return (count * change + delta) / (count + 1)


class Linear(WeightRule[None]):
    """Weighted averaging of the experts' weights: Σₖ wₖ θₖ, with the wₖ divided by their sum unless told otherwise.

    Weights that do not sum to one scale the base too: Σₖ wₖ θₖ = (Σₖ wₖ) θ₀ + Σₖ wₖ τₖ.

    Args:
        weights: one for all experts, a list, or by name; negative ones too.
        normalize: divide them by their sum. Raises InputError where that is 0.
    """

    elementwise = True

    def __init__(self, weights: Weights = 1.0, normalize: bool = True) -> None:
        self.task_weights, self.normalize = weights, normalize

    def check(self, tasks: tuple[str, ...]) -> None:
        self._weights(tasks)

    def weights(self, stack: Stack, statistics: None) -> Tensor:
        weights = self._weights(stack.tasks)
        origin = stack.base if self.normalize else sum(weights) * stack.base
        return origin + weighted_sum(stack.deltas, weights)

    def _weights(self, tasks: tuple[str, ...]) -> list[float]:
        return (shares if self.normalize else per_task)(self.task_weights, tasks, "Linear")


class MetaGpt(Rule[list[float]]):
    """Task arithmetic with coefficients in closed form (MetaGPT, arXiv:2406.11385): Σₖ λₖ τₖ, λₖ = |τₖ|² / Σⱼ |τⱼ|².

    The norms are those of whole task vectors, found by one pass over all tensors; nothing is left to be tuned.
    """

    elementwise = True

    def fit(self, task_vectors: TaskVectors) -> list[float]:
        """λ of each expert."""
        squares = [0.0] * len(task_vectors.tasks)
        for _, deltas in parameters(task_vectors):
            for k, delta in enumerate(dense(deltas)):
                squares[k] += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
        return [square / (sum(squares) or 1.0) for square in squares]

    def combine(self, stack: Stack, statistics: list[float]) -> Tensor:
        return weighted_sum(stack.deltas, statistics)


class Expo(Rule[None]):
    """One expert, and further the way that it went from the base (ExPO, arXiv:2404.16792): θ₁ + β (θ₁ − θ₀).

    Takes one expert: τ = (1 + β) τ₁. The base is the model that the expert was aligned from.

    Args:
        beta: how much further; below 0 the merge lies between the two.
    """

    elementwise = True

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = beta

    def check(self, tasks: tuple[str, ...]) -> None:
        check_count(1, tasks, "Expo")

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        return (1 + self.beta) * stack.deltas[0]


class LearnedCoefficients(Rule[None]):
    """Σₖ λₖ τₖ with coefficients by tensor (or column) and task, as a run leaves them in `coefficients.json`.

    Raises InputError where a task or tensor that differs from the base has no coefficient, or one of another width.
    """

    def __init__(self, table: CoefficientTable | str | Path) -> None:
        self.table = table if isinstance(table, CoefficientTable) else read_coefficients(table)

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        name, deltas, tasks = stack.name, stack.deltas, stack.tasks
        if sorted(tasks) != sorted(self.table.tasks):
            raise InputError(
                f"the coefficients are for tasks {sorted(self.table.tasks)}, the experts are {sorted(tasks)}"
            )
        if name not in self.table.rows:
            if bool(deltas.any()):
                raise InputError(f"no coefficient for tensor {name}, which the experts changed")
            return deltas.new_zeros(deltas.shape[1:])
        row = self.table.tensor(name, tasks).to(deltas)
        if row.dim() == 1:
            return (row @ matrix(deltas)).view(deltas.shape[1:])
        if row.shape[0] != deltas.shape[2:3].numel() or deltas.dim() < 3:
            raise InputError(f"{name} has {row.shape[0]} coefficients per task, and shape {list(deltas.shape[1:])}")
        return column_sum(row, torch.zeros_like(deltas[0]), deltas)
