"""Sensitivity-guided coefficients: more of an expert where its task depends on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from adamerge.checkpoints import meta
from adamerge.deltas import AnyDeltas
from adamerge.errors import InputError
from adamerge.kinds import block_of, kind
from adamerge.observing import Measure
from adamerge.rules.base import PerTensor, each_expert
from adamerge.statistics import Informed, Statistics
from adamerge.task_vectors import TaskVectors


class SensMerging(Informed, PerTensor[Mapping[str, list[float]]]):
    """Sens-Merging (arXiv:2502.12420): every expert's blocks times how sensitive its task is to them; others combine.

    τ̂ₖ = λₖ τₖ in block l, with λₖ,ₗ = K · αₖ,ₗ · softmaxₖ(gₖ / T). The sensitivity αₖ,ₗ is Σ |θ · ∂L/∂θ| over the
    tensors of the block, within each expert divided by its root mean square over blocks; gₖ is how well the expert
    agrees with the others on their data, the mean of their "agreement". λ is about 1 on the whole, so that scales of
    `TaskArithmetic`, `Trim` and `ElectSign`, or `Dare` after it stay what they are. Needs labels.

    Args:
        statistics: with the "sensitivity" and the "agreement" of every expert (`adamerge.statistics.collect` with
            targets="labels", then `adamerge.agreement.with_agreement`), or their folder.
        temperature: T.
    """

    measures: ClassVar[tuple[Measure, ...]] = ("sensitivity", "agreement")
    labelled = True
    elementwise = True
    passes = 0

    def __init__(self, statistics: Statistics | str | Path | None = None, temperature: float = 1.0) -> None:
        if not 0 < temperature < float("inf"):
            raise InputError(f"expected temperature > 0 in SensMerging, got {temperature}")
        self.statistics, self.temperature = statistics, temperature

    def fit(self, task_vectors: TaskVectors) -> Mapping[str, list[float]]:
        """λ of every expert, by tensor."""
        tasks = task_vectors.tasks
        self.check(tasks)
        statistics = self.opened()
        names = [name for name in task_vectors.deltas if kind(name, meta(task_vectors.base, name)) == "parameter"]
        blocks = block_of(names)
        shares = agreement_shares(statistics, tasks, self.temperature)
        factors = [sensitivities(statistics, task, blocks) for task in tasks]
        return {
            name: [len(tasks) * share * factor[blocks[name]] for share, factor in zip(shares, factors, strict=True)]
            for name in names
        }

    def tensor(self, name: str, deltas: AnyDeltas, statistics: Mapping[str, list[float]]) -> AnyDeltas:
        return each_expert(deltas, lambda k, delta: statistics[name][k] * delta)


def agreement_shares(statistics: Statistics, tasks: tuple[str, ...], temperature: float) -> list[float]:
    """softmax(g / T) over the experts, g the mean of an expert's agreement with the others, 1 where there are none."""
    means = []
    for task in tasks:
        values = [statistics.find("agreement", task, other) for other in tasks if other != task]
        if any(value is None for value in values):
            raise InputError(f"SensMerging needs the agreement of {task!r} with all of {', '.join(tasks)}: measure it")
        means.append(sum(map(float, values)) / len(values) if values else 1.0)  # type: ignore[arg-type]
    return (torch.tensor(means, dtype=torch.float64) / temperature).softmax(0).tolist()


def sensitivities(statistics: Statistics, task: str, blocks: Mapping[str, str]) -> dict[str, float]:
    """Σ |θ · ∂L/∂θ| over the tensors of each block, divided by the root mean square over blocks."""
    sums = dict.fromkeys(blocks.values(), 0.0)
    for name, block in blocks.items():
        if (value := statistics.find("sensitivity", task, name)) is not None:
            sums[block] += float(value)
    size = (sum(value**2 for value in sums.values()) / len(sums)) ** 0.5
    return {block: value / size if size else 1.0 for block, value in sums.items()}
