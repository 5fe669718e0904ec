"""Surrogates of the tasks' losses, and the trade-offs between tasks that they promise."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from adamerge import InputError
from trainers import figures
from trainers.search import Search
from trainers.steps import Batch

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation


class MAP(Search):
    """Low-compute merging with amortised Pareto fronts (MAP, arXiv:2406.07529).

    Random task-wise merges λ ~ U[0, high]^K are scored on some batches; a quadratic in λ is fitted to each task's mean
    loss; where no other λ is better for all tasks by these quadratics is the front, found by descending along weighted
    sums of them. The coefficients are the front's point for one preference, min_λ Σ_t w_t q_t(λ). A last batch, which
    the fit has not seen, tells what the front is worth: both are drawn in `figures/pareto_front.png`.

    A quadratic has (K + 1)(K + 2) / 2 numbers; of fewer merges than that, the fit with the smallest numbers is taken.

    Args:
        merges: how many random merges are scored; default: twice the numbers of a quadratic.
        high: the largest coefficient; default: twice the usual scale of the suite.
        preference: weights by task; tasks that are not named have weight 1.
        points: how many random preferences the front is drawn from.
        batches: the number of batches to score on.
    """

    def __init__(
        self,
        merges: int | None = None,
        high: float | None = None,
        preference: dict[str, float] | None = None,
        points: int = 64,
        batches: int = 10,
    ) -> None:
        super().__init__(batches)
        self.merges, self.high, self.preference, self.points = merges, high, preference or {}, points
        if min(merges or 2, points) < 2 or (high is not None and high <= 0):
            raise InputError(f"MAP needs two merges, two points and high > 0, not {merges}, {points} and {high}")

    @property
    def complete(self) -> bool:
        return "true" in self.kept

    def check(self, run: "Adaptation", learning: list[str]) -> None:
        super().check(run, learning)
        if odd := sorted(self.preference.keys() - set(run.suite.tasks)):
            raise InputError(f"preference names {odd[0]!r}; tasks are {', '.join(run.suite.tasks)}")
        if min(self.preference.values(), default=1) < 0:
            raise InputError(f"a preference is made of weights of at least 0, not {self.preference}")
        if run.coefficients.bound == "clamp" and (self.high or 0) > 1:
            raise InputError(f"high {self.high} leaves [0, 1], to which these coefficients are clamped")

    def step(self, run: "Adaptation", batch: Batch) -> None:
        if len(batch) < len(run.suite.tasks):
            raise InputError("MAP scores all tasks at every step: leave tasks_per_step out")
        assert self.batches is not None
        if self.kept.get("steps", 0) >= self.batches:  # on images that the surrogates have not seen
            self.kept["true"] = self._losses(run, batch, self.kept["front"])
            return
        if not self.kept:
            size = len(run.suite.tasks)
            count = self.merges or (size + 1) * (size + 2)
            high = self.high or min(1.0, 2 * run.suite.scale)
            self.kept = {"high": high, "merges": high * torch.rand(count, size, dtype=torch.float64)}
        done = self.kept.get("steps", 0)
        mean = (done * self.kept.get("losses", 0) + self._losses(run, batch, self.kept["merges"])) / (done + 1)
        self.kept["losses"] = mean
        self._choose(run, last=done + 1 == self.batches)

    def _losses(self, run: "Adaptation", batch: Batch, merges: Tensor) -> Tensor:
        """[N, T] mean losses of task-wise merges [N, K]."""
        scores = [self.score(run, batch, merge) for merge in merges]
        return torch.stack([torch.stack([score[task].double().mean() for task in run.suite.tasks]) for score in scores])

    def _choose(self, run: "Adaptation", last: bool) -> None:
        """Take the merge that the preference asks for; after the last batch, keep the front too, this merge first."""
        merges, losses, high = self.kept["merges"], self.kept["losses"], self.kept["high"]
        weights = torch.tensor([[self.preference.get(task, 1.0) for task in run.suite.tasks]], dtype=torch.float64)
        if last:
            drawn = torch.empty(self.points, weights.shape[1], dtype=torch.float64).exponential_()
            weights = torch.cat([weights, drawn])
        surrogate = Quadratic.fit(merges, losses, high)
        found = surrogate.minimise(weights, merges[(losses @ weights.T).argmin(0)], high)
        run.coefficients.assign(found[0].expand_as(run.coefficients.raw))
        if last:
            promised = surrogate(found)
            keep = undominated(promised)
            keep[0] = True
            self.kept |= {"front": found[keep], "promised": promised[keep]}

    def figures(self, tasks: tuple[str, ...], folder: Path) -> None:
        if self.complete:
            figures.pareto_front(self.kept["promised"], self.kept["true"], tasks, folder / "pareto_front.png")


class Quadratic(NamedTuple):
    """q_t(λ) = c_t + b_t·λ + ½ λᵀ A_t λ for T tasks: c [T], b [T, K], A [T, K, K]."""

    constant: Tensor
    slope: Tensor
    curvature: Tensor

    @classmethod
    def fit(cls, points: Tensor, values: Tensor, high: float) -> "Quadratic":
        """Least squares on points [n, K] in [0, high]^K and their values [n, T].

        Coordinates are centred and scaled to [−1, 1]. Of all fits that are as good, that with the smallest numbers.
        """
        size = points.shape[1]
        z = 2 * points / high - 1
        rows, columns = torch.triu_indices(size, size)
        design = torch.cat([torch.ones_like(z[:, :1]), z, z[:, rows] * z[:, columns]], 1)
        found = torch.linalg.lstsq(design, values, driver="gelsd").solution.T
        constant, slope, curvature = found[:, 0], found[:, 1 : size + 1], found.new_zeros(len(found), size, size)
        curvature[:, rows, columns] = found[:, size + 1 :]
        curvature = curvature + curvature.mT
        # From z = 2 λ / high − 1 back to λ.
        corner = curvature.sum(2)
        constant = constant - slope.sum(1) + corner.sum(1) / 2
        return cls(constant, (slope - corner) * 2 / high, curvature * 4 / high**2)

    def __call__(self, points: Tensor) -> Tensor:
        """Values [n, T] at points [n, K]."""
        bent = torch.einsum("nk,tkl,nl->nt", points, self.curvature, points)
        return self.constant + points @ self.slope.T + bent / 2

    def minimise(self, weights: Tensor, starts: Tensor, high: float, iterations: int = 2000) -> Tensor:
        """argmin over [0, high]^K of Σ_t w_t q_t, [P, K], for weights [P, T] from starts [P, K].

        By projected gradient steps of 1 / L, L the largest curvature in size; a local minimum where the sum bends down.
        """
        slope = weights @ self.slope
        curvature = torch.einsum("pt,tkl->pkl", weights, self.curvature)
        steepest = torch.linalg.eigvalsh(curvature).abs().amax(1, keepdim=True).clamp(min=1e-12)
        for _ in range(iterations):
            gradient = slope + torch.einsum("pkl,pl->pk", curvature, starts)
            before, starts = starts, (starts - gradient / steepest).clamp(0, high)
            if float((starts - before).abs().max()) < 1e-9 * high:
                break
        return starts


def undominated(losses: Tensor) -> Tensor:
    """[n] whether no other row of losses [n, T] is as low in every task and lower in one."""
    as_low = (losses[:, None] <= losses[None]).all(2)
    lower = (losses[:, None] < losses[None]).any(2)
    return ~(as_low & lower).any(0)
