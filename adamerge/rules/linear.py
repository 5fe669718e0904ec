"""Rules that are linear in the task vectors."""

from pathlib import Path

import torch
from torch import Tensor

from adamerge.coefficients import CoefficientTable, read_coefficients
from adamerge.errors import InputError
from adamerge.ops import column_sum, matrix
from adamerge.rules.base import Rule, Stack


class TaskArithmetic(Rule[None]):
    """Task arithmetic (arXiv:2212.04089): Σₖ τₖ, to be scaled by one number (0.3 for the field's eight CLIP tasks)."""

    elementwise = True

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        return stack.deltas.sum(0)


class Mean(Rule[None]):
    """Simple averaging: (1/K) Σₖ τₖ, which is the mean of the experts' weights at scale 1."""

    elementwise = True

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        return stack.deltas.mean(0)

    def merged(self, stack: Stack, statistics: None, scale: float) -> Tensor:
        # Exact wherever Σₖ θₖ is; base + mean(τ) would round twice.
        experts = len(stack.tasks)
        mean = (experts * stack.base + stack.deltas.sum(0)) / experts
        return torch.lerp(stack.base, mean, scale)


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
