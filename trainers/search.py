"""Gradient-free adaptation: programs that score candidate coefficients by forward passes alone."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from adamerge import InputError
from modules import View
from modules.bounds import Bound
from trainers.programs import Losses, Program
from trainers.steps import Batch

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation


class Search(Program):
    """Moves the coefficients by what candidates score on a batch; nothing is back-propagated through the model.

    After each step the coefficients hold the best estimate so far, and the losses of the step are those at that
    estimate. A search that is complete leaves it as it is and ends the run, unless another phase follows.

    Args:
        batches: after how many steps the search is complete; `None`: it lasts as long as the run.
    """

    descends = False
    #: The bounds under which the coefficients can take whatever the search may find.
    bounds: tuple[Bound, ...] = ("none", "clamp")

    def __init__(self, batches: int | None) -> None:
        if batches is not None and batches < 1:
            raise InputError(f"{type(self).__name__} needs at least one batch, not {batches}")
        self.batches = batches
        #: What the next step depends on: tensors on the CPU, none of them ever changed in place, and plain values.
        self.kept: dict[str, Any] = {}

    @abstractmethod
    def step(self, run: "Adaptation", batch: Batch) -> None:
        """Score candidates on a batch and move the coefficients."""

    @property
    def complete(self) -> bool:
        """Whether further batches change nothing."""
        return self.batches is not None and self.kept.get("steps", 0) >= self.batches

    def check(self, run: "Adaptation", learning: list[str]) -> None:
        name, bound, trainer = type(self).__name__, run.coefficients.bound, run._trainer
        if learning != ["coefficients"]:
            raise InputError(f"{name} moves the coefficients alone: set learn to [coefficients], not {learning}")
        if bound not in self.bounds:
            raise InputError(f"{name} needs coefficients of bound {' or '.join(self.bounds)}, not {bound}")
        if trainer is not None and (trainer.world_size > 1 or trainer.accumulate_grad_batches > 1):
            raise InputError(f"{name} takes whole batches: use one process, and accumulate_grad_batches of 1")

    @torch.no_grad()
    def losses(self, run: "Adaptation", batch: Batch) -> Losses:
        if not self.complete:
            self.step(run, batch)
            self.kept["steps"] = self.kept.get("steps", 0) + 1
        if self.complete and run.phase is run.phases[-1]:
            run.trainer.should_stop = True
        return run.losses(batch)

    def score(
        self, run: "Adaptation", batch: Batch, candidate: Tensor, of: Callable[[View], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """By task, what a merge gives for each image: the losses [B] of the phase's objective, or another function.

        The candidate is made of effective coefficients for the rows that learn, [rows, K], or [K] for all of them. All
        candidates of a step see the same images: what is common to them does not blur their differences.
        """
        of = of or run.phase.objective
        values = candidate.to(run.coefficients.raw).expand_as(run.coefficients.raw)
        with run.coefficients.at(run.coefficients.whole(values)):
            shared = None if run.micro_batches else run.passing(batch)
            return {task: of(run.view(task, part, shared)).cpu() for task, part in batch.items()}

    def reset(self) -> None:
        self.kept = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.kept)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept = dict(state)


class Static(Search):
    """Nothing moves: a merge is scored as it begins, and the run ends after one batch."""

    learns = False

    def __init__(self) -> None:
        super().__init__(batches=1)

    def check(self, run: "Adaptation", learning: list[str]) -> None:
        """Whatever a run has may stay as it is."""

    def step(self, run: "Adaptation", batch: Batch) -> None:
        """No candidates."""


class GridSearch(Search):
    """The scale of the least loss among some: argmin_λ Σ_t ℓ_t(θ₀ + λ Σₖ τₖ), the mean over all batches so far.

    Of a static merge (`adamerge.rules.Merged`), λ is the scale. By entropy, no label is seen; by `modules.Mistakes` on
    labelled images the scale is chosen by accuracy, as most published figures of static merges were.

    Args:
        grid: the scales; default: ten from a fifth of the usual scale of the suite to twice that scale.
        batches: the number of batches to compare on.
    """

    def __init__(self, grid: list[float] | None = None, batches: int = 10) -> None:
        super().__init__(batches)
        self.grid = grid
        if grid is not None and not grid:
            raise InputError("grid is empty: name some scales")

    def check(self, run: "Adaptation", learning: list[str]) -> None:
        super().check(run, learning)
        points = self._points(run)
        if run.coefficients.bound == "clamp" and not 0 <= float(points.min()) <= float(points.max()) <= 1:
            raise InputError(f"grid {self.grid} leaves [0, 1], to which these coefficients are clamped")

    def step(self, run: "Adaptation", batch: Batch) -> None:
        points = self._points(run)
        found = [sum(float(losses.double().mean()) for losses in self.score(run, batch, p).values()) for p in points]
        self.kept["losses"] = total = self.kept.get("losses", 0) + torch.tensor(found, dtype=torch.float64)
        run.coefficients.assign(points[int(total.argmin())].expand_as(run.coefficients.raw))

    def _points(self, run: "Adaptation") -> Tensor:
        """Coefficients of the candidates, [N, 1]."""
        grid = [run.suite.scale * n / 5 for n in range(1, 11)] if self.grid is None else self.grid
        return torch.tensor(grid, dtype=torch.float64)[:, None]


class AdaMMS(Search):
    """The merge whose predictions differ least from its neighbours' on a grid (AdaMMS, arXiv:2503.23733).

    argmin_i d(i−1, i) + d(i, i+1), where d is the share of images that two neighbours put into different classes, the
    mean over tasks and over all batches so far: no labels and no loss, so the objective is not used. The ends of the
    grid have one neighbour each and would win by half a sum; they serve as neighbours and are not chosen. The grid has
    to end among good models: merges that have broken down agree with each other best of all.

    Args:
        grid: at least three numbers in rising order; default: eleven from 0 to 1 for interpolation, from 0 to twice the
            usual scale of the suite for scales.
        path: `scale`: one coefficient for all tasks, θ₀ + λ Σₖ τₖ; `interpolation`, as published, for two experts:
            (1 − λ) τ₁ + λ τ₂.
        batches: the number of batches to compare on.
    """

    def __init__(
        self,
        grid: list[float] | None = None,
        path: Literal["scale", "interpolation"] = "scale",
        batches: int = 10,
    ) -> None:
        super().__init__(batches)
        self.grid, self.path = grid, path
        if grid is not None and (len(grid) < 3 or sorted(set(grid)) != list(grid)):
            raise InputError(f"grid needs at least three numbers in rising order, not {grid}")

    def check(self, run: "Adaptation", learning: list[str]) -> None:
        super().check(run, learning)
        if self.path == "interpolation" and len(run.suite.tasks) != 2:
            raise InputError(f"interpolation is between two experts, not {len(run.suite.tasks)}: use path scale")
        points = self._points(run)
        if run.coefficients.bound == "clamp" and not 0 <= float(points.min()) <= float(points.max()) <= 1:
            raise InputError(f"grid {self.grid} leaves [0, 1], to which these coefficients are clamped")

    def step(self, run: "Adaptation", batch: Batch) -> None:
        points = self._points(run)
        classes = [self.score(run, batch, point, lambda view: view.logits.argmax(-1)) for point in points]
        apart = [
            sum(float((here[task] != there[task]).double().mean()) for task in batch) / len(batch)
            for here, there in pairwise(classes)
        ]
        self.kept["apart"] = total = self.kept.get("apart", 0) + torch.tensor(apart, dtype=torch.float64)
        run.coefficients.assign(points[1 + int((total[:-1] + total[1:]).argmin())].expand_as(run.coefficients.raw))

    def _points(self, run: "Adaptation") -> Tensor:
        """Coefficients of the candidates, [N, 1] for scales and [N, 2] for interpolation."""
        most = 1.0 if self.path == "interpolation" else 2 * run.suite.scale
        grid = [most * n / 10 for n in range(11)] if self.grid is None else self.grid
        points = torch.tensor(grid, dtype=torch.float64)[:, None]
        return torch.cat([1 - points, points], 1) if self.path == "interpolation" else points


class LMCocktail(Search):
    """Experts weighted by how well they do on a few examples: w = softmax(−ℓ / T) (LM-Cocktail, arXiv:2311.13534).

    The paper has one target task. Here every task is one: w_k = mean_t softmax_k(−ℓ_kt / T), the mean of the tasks' own
    cocktails, with ℓ_kt the loss of expert k under the head of task t, over all batches so far. (A softmax of losses
    that were averaged over tasks first would weight an expert by the tasks that it does not know.) The paper's losses
    take labels (`Supervised`, `allow_labels`); any objective serves.

    Args:
        temperature: T; 5 in the published code, for the losses of language models.
        base: let the base take a weight too, w_0; the rest is spread over the experts.
        batches: the number of batches to average over.
    """

    def __init__(self, temperature: float = 5.0, base: bool = False, batches: int = 1) -> None:
        super().__init__(batches)
        self.temperature, self.base = temperature, base
        if temperature <= 0:
            raise InputError(f"temperature must be positive, not {temperature}")

    def step(self, run: "Adaptation", batch: Batch) -> None:
        tasks = run.suite.tasks
        models = torch.eye(len(tasks), dtype=torch.float64)
        if self.base:
            models = torch.cat([models, torch.zeros_like(models[:1])])
        totals, counts = torch.zeros(len(models), len(tasks), dtype=torch.float64), torch.zeros(len(tasks))
        for number, model in enumerate(models):
            for task, losses in self.score(run, batch, model).items():
                totals[number, tasks.index(task)] = losses.double().mean()
        counts[[tasks.index(task) for task in batch]] = 1
        self.kept["losses"] = totals = self.kept.get("losses", 0) + totals
        self.kept["counts"] = counts = self.kept.get("counts", 0) + counts
        means = (totals / counts)[:, counts > 0]  # of the tasks that have been seen
        weights = (-means / self.temperature).softmax(0).mean(1)
        run.coefficients.assign(weights[: len(tasks)].expand_as(run.coefficients.raw))
