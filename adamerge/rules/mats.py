"""Matching models in their task subspaces: a linear system for each layer, solved by conjugate gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.observing import Measure
from adamerge.rules.base import Rule, Stack
from adamerge.rules.regmean import shrunk
from adamerge.statistics import Informed, Statistics


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """x with A x = target for a symmetric positive semi-definite A, in at most so many steps from `start`.

    Stops where |target − A x| ≤ tolerance · |target − A start|, and on directions that A maps to 0.
    """
    x, residual = start, target - apply(start)
    direction, square = residual, float(residual.square().sum())
    goal = tolerance**2 * square
    for _ in range(iterations):
        image = apply(direction)
        curvature = float((direction * image).sum())
        if square <= goal or curvature <= 0:
            break
        x = x + square / curvature * direction
        residual = residual - square / curvature * image
        before, square = square, float(residual.square().sum())
        direction = residual + square / before * direction
    return x


class MaTs(Informed, Rule[Statistics]):
    """MaTS (arXiv:2312.04339): each linear layer where the experts' Fisher information wants it, by conjugate gradient.

    min_X Σₖ ⟨X − τₖ, Bₖ (X − τₖ) Aₖ⟩, with the Fisher information of a layer as the Kronecker product of the Gram
    matrices of its inputs, Aₖ, and of its outputs' gradients, Bₖ: Σₖ Bₖ X Aₖ = Σₖ Bₖ τₖ Aₖ. Both are shrunk,
    ρ A + (1 − ρ) diag A. All else is the mean of the experts. The Grams of all experts are held for one layer.

    Args:
        statistics: with the "gram" and "output_gram" of every expert (`adamerge.statistics.collect`), or their folder.
        rho: ρ, 0 ≤ ρ ≤ 1.
        iterations: steps, at most: stopping early keeps the merge near its start.
        tolerance: of the residual, as a fraction of that at the start.
        start: the first X as a factor of Σₖ τₖ; default 1/K, the mean. Published figures start at 0.3.
    """

    measures: ClassVar[tuple[Measure, ...]] = ("gram", "output_gram")

    def __init__(
        self,
        statistics: Statistics | str | Path | None = None,
        rho: float = 0.95,
        iterations: int = 100,
        tolerance: float = 1e-5,
        start: float | None = None,
    ) -> None:
        if not (0 <= rho <= 1 and iterations >= 0 and tolerance >= 0):
            given = f"{rho}, {iterations} and {tolerance}"
            raise InputError(f"expected 0 <= rho <= 1, iterations >= 0 and tolerance >= 0 in MaTs, got {given}")
        self.statistics, self.rho, self.start = statistics, rho, start
        self.iterations, self.tolerance = iterations, tolerance

    def fit(self, task_vectors: object) -> Statistics:
        """The statistics, opened."""
        return self.opened()

    def combine(self, stack: Stack, statistics: Statistics) -> Tensor:
        flipped = statistics.transposed(stack.name)
        deltas = stack.deltas.mT if flipped else stack.deltas
        if deltas.dim() != 3:
            return stack.deltas.mean(0)
        inputs = statistics.of_layer("gram", stack.name, stack.tasks, deltas.shape[2])
        outputs = statistics.of_layer("output_gram", stack.name, stack.tasks, deltas.shape[1])
        if inputs is None or outputs is None:
            return stack.deltas.mean(0)
        pairs = [
            (shrunk(a.to(deltas.device), self.rho), shrunk(b.to(deltas.device), self.rho))
            for a, b in zip(inputs, outputs, strict=True)
        ]
        merged = self._solve(deltas.double(), pairs).to(deltas.dtype)
        return merged.T if flipped else merged

    def _solve(self, deltas: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        mean = deltas.mean(0)
        # Around the mean, so that what all experts share is exact.
        target = torch.zeros_like(mean)
        for delta, (a, b) in zip(deltas, pairs, strict=True):
            target += b @ (delta - mean) @ a
        start = torch.zeros_like(mean) if self.start is None else self.start * deltas.sum(0) - mean

        def apply(x: Tensor) -> Tensor:
            return torch.stack([b @ x @ a for a, b in pairs]).sum(0)

        return mean + conjugate_gradient(apply, target, start, self.iterations, self.tolerance)
