"""Fisher averaging: every weight as the experts that depend on it want it."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.errors import InputError
from adamerge.kinds import kind
from adamerge.observing import Measure
from adamerge.rules.base import Rule, Stack
from adamerge.statistics import Informed, Statistics
from adamerge.task_vectors import TaskVectors

Fitted = tuple[Statistics, list[float]]


class Fisher(Informed, Rule[Fitted]):
    """Fisher-weighted averaging (arXiv:2111.09832): θ = Σₖ cₖ Fₖ θₖ / Σₖ cₖ Fₖ, entry by entry.

    Fₖ is the diagonal of expert k's Fisher information, E[(∂ log p / ∂θ)²] sample by sample (see
    `adamerge.observing.observe` for whose classes these are), and cₖ = 1/√mean(Fₖ²) over all parameters, so that no
    expert has more to say for being less sure on the whole. Entries that matter to no expert are averaged. Without
    labels unless the statistics were collected with them.

    Args:
        statistics: with the "fisher" of every expert (`adamerge.statistics.collect`), or a folder of them.
        normalize: False for the same c for all experts.
        floor: is added to c F, whose root mean square is 1.
    """

    measures: ClassVar[tuple[Measure, ...]] = ("fisher",)

    def __init__(
        self, statistics: Statistics | str | Path | None = None, normalize: bool = True, floor: float = 1e-6
    ) -> None:
        if not 0 < floor < float("inf"):
            raise InputError(f"expected floor > 0 in Fisher, got {floor}")
        self.statistics, self.normalize, self.floor = statistics, normalize, floor

    def fit(self, task_vectors: TaskVectors) -> Fitted:
        """The statistics, opened, and c of every expert."""
        statistics, tasks = self.opened(), task_vectors.tasks
        names = [name for name in task_vectors.deltas if kind(name, meta(task_vectors.base, name)) == "parameter"]
        squares = [0.0] * len(tasks)
        for k, task in enumerate(tasks):
            for name in names:
                if (fisher := statistics.find("fisher", task, name)) is not None:
                    squares[k] += float(torch.linalg.vector_norm(fisher, dtype=torch.float64)) ** 2
        if not self.normalize:
            squares = [sum(squares) / len(squares)] * len(squares)
        count = sum(meta(task_vectors.base, name).numel() for name in names)
        return statistics, [(count / square) ** 0.5 if square else 1.0 for square in squares]

    def combine(self, stack: Stack, statistics: Fitted) -> Tensor:
        mean = stack.deltas.mean(0)
        moment, total = torch.zeros_like(mean), torch.zeros_like(mean)
        for delta, task, factor in zip(stack.deltas, stack.tasks, statistics[1], strict=True):
            weight = self._weight(statistics[0].find("fisher", task, stack.name), factor, task, stack)
            moment += weight * (delta - mean)
            total += weight
        return mean + moment / total

    def _weight(self, fisher: Tensor | None, factor: float, task: str, stack: Stack) -> Tensor:
        """c F + floor; 0 where a parameter has no gradient."""
        if fisher is None:
            return torch.full_like(stack.base, self.floor)
        if fisher.shape != stack.base.shape:
            shapes = f"{list(fisher.shape)}, expected {list(stack.base.shape)}"
            raise InputError(f"{stack.name}: the fisher of {task!r} has shape {shapes}")
        return factor * fisher.to(stack.base) + self.floor
