"""What a step does with its batch: one joint loss, an inner step before the outer one, a balance of the tasks, ..."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamerge import InputError
from modules.merged import hand_on
from trainers.steps import Batch

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation

#: Each task's mean loss, and each task's logits [B, C], without a gradient, as far as they were computed.
Losses = tuple[dict[str, Tensor], dict[str, Tensor]]


class Program(ABC):
    """Turns a batch into losses, whose plain sum takes the backward pass before the optimiser moves what learns.

    What it keeps from step to step it gives in `state_dict`, as tensors and plain values: a run resumes exactly.
    """

    #: Whether the optimiser moves what learns; if not, the program does so itself and its losses take no gradient.
    descends: bool = True
    #: Whether anything moves at all.
    learns: bool = True

    @abstractmethod
    def losses(self, run: "Adaptation", batch: Batch) -> Losses:
        """The losses of a step."""

    def check(self, run: "Adaptation", learning: list[str]) -> None:  # noqa: B027  most programs suit every run
        """Raise InputError for a run that the program does not suit; `learning` are the parts that learn with it."""

    def reset(self) -> None:  # noqa: B027  most programs keep nothing
        """Forget what an earlier run left."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027  most programs keep nothing
        """Go on from there."""

    def figures(self, tasks: tuple[str, ...], folder: Path) -> None:  # noqa: B027  most programs have none
        """Draw, at the end of a run, what is worth seeing of it."""


class Joint(Program):
    """The tasks' losses as they are."""

    def losses(self, run: "Adaptation", batch: Batch) -> Losses:
        return run.losses(batch)


class BiLevel(Program):
    """A step of what learns, taken where a step of the coefficients leads to (Concrete AdaMerging, arXiv:2312.06173).

    On the first half of the batch, λ' = λ − η g / (|g| + ε), which is the first step of Adam; on the second half, the
    loss at λ', now a constant, takes the backward pass. λ itself stays where it is.

    Args:
        lr: η, in units of the largest |λ|. Published code has η = 1 for λ = 0.3, which clamps λ' to 0 or 1: far outside
            of what an expert's scale of 0.1 allows.
        stale: the published order: g is taken at the weights of the step before, merged with its λ'. The paper has λ.
    """

    def __init__(self, lr: float = 1.0, stale: bool = False) -> None:
        self.lr, self.stale = lr, stale
        self._last: Tensor | None = None

    def check(self, run: "Adaptation", learning: list[str]) -> None:
        if "coefficients" in learning:
            raise InputError("BiLevel moves the coefficients in its inner step: leave them out of learn")

    def losses(self, run: "Adaptation", batch: Batch) -> Losses:
        if any(len(part["index"]) < 2 for part in batch.values()):
            raise InputError("BiLevel splits every batch in two: batch_size must be at least 2 per process")
        halves = {task: {name: x.tensor_split(2) for name, x in part.items()} for task, part in batch.items()}
        inner, outer = ({t: {n: x[half] for n, x in part.items()} for t, part in halves.items()} for half in (0, 1))
        raw = run.coefficients.raw
        start = raw.detach().clone()
        with torch.no_grad():
            raw.copy_(start if self._last is None else self._last)
        step = self._gradient(run, inner)
        with torch.no_grad():
            raw.copy_(start - self.lr * start.abs().max() * step / (step.abs() + 1e-8))
            self._last = raw.detach().clone() if self.stale and bool(raw.isfinite().all()) else None
        try:
            return run.losses(outer)
        finally:
            with torch.no_grad():
                raw.copy_(start)

    @staticmethod
    def _gradient(run: "Adaptation", batch: Batch) -> Tensor:
        """Of the coefficients alone, averaged over processes, under the random numbers that the outer loss will see."""
        raw, others = run.coefficients.raw, [p for _, p in run.learned() if p.requires_grad]
        for parameter in others:
            parameter.requires_grad_(False)
        raw.requires_grad_(True)
        try:
            with torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
                losses, _ = run.losses(batch)
            (gradient,) = torch.autograd.grad(torch.stack(list(losses.values())).sum(), raw)
        finally:
            raw.requires_grad_(False)
            for parameter in others:
                parameter.requires_grad_(True)
        return average(run, gradient)

    def reset(self) -> None:
        self._last = None

    def state_dict(self) -> dict[str, Any]:
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = state["last"]


class Weighted(Program):
    """The tasks' losses weighted by a preference: min Σ_t w_t ℓ_t.

    Args:
        preference: weights by task; tasks that are not named have weight 1.
    """

    def __init__(self, preference: dict[str, float]) -> None:
        self.preference = preference

    def check(self, run: "Adaptation", learning: list[str]) -> None:
        if odd := sorted(self.preference.keys() - set(run.suite.tasks)):
            raise InputError(f"preference names {odd[0]!r}; tasks are {', '.join(run.suite.tasks)}")
        if any(weight < 0 for weight in self.preference.values()):
            raise InputError(f"a preference is made of weights of at least 0, not {self.preference}")

    def losses(self, run: "Adaptation", batch: Batch) -> Losses:
        return run.losses(batch, self.preference)


class MGDA(Program):
    """The direction in which no task's loss rises: the shortest vector among the mixtures of the tasks' gradients.

    min_α ‖Σ_t α_t g_t‖² over the simplex (multiple-gradient descent, arXiv:1810.04650), with g_t the gradient of all
    that learns; the step descends along Σ_t α_t g_t. The model merges once; every task takes a forward and a backward
    pass of its own.
    """

    def losses(self, run: "Adaptation", batch: Batch) -> Losses:
        parameters = [p for _, p in run.learned() if p.requires_grad]
        losses, logits, gradients = {}, {}, []
        with run.merged.holding(run.merged.weights()):
            for task, part in batch.items():
                own, seen = run.losses({task: part})
                # The merge is shared by all tasks, and nothing of it is kept but references to the task vectors.
                found = torch.autograd.grad(own[task], parameters, retain_graph=True, materialize_grads=True)
                gradients.append([average(run, gradient) for gradient in found])
                losses[task] = own[task].detach()
                logits.update(seen)
        flat = torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in gradients])
        weights = shortest(flat.double() @ flat.double().T).to(flat.dtype)
        combined = [torch.tensordot(weights, torch.stack(each), 1) for each in zip(*gradients, strict=True)]
        handed = hand_on(combined, list(losses.values()), parameters)
        return dict(zip(losses, handed, strict=True)), logits


class Alternate(Program):
    """Tuning for each task apart, from the merged point, then merging again (ATM, arXiv:2411.03055).

    From what is learned, φ, every task takes `local_steps` steps of SGD, each on a share of its images, to φ_t. The
    optimiser is given φ − mean_t φ_t as the gradient: under SGD its rate is the scale of the merge,
    φ ← φ + rate · mean_t (φ_t − φ), and one local step is a step on the tasks' mean loss.

    Args:
        local_steps: steps of tuning per task before each merge.
        lr: their learning rate.
    """

    def __init__(self, local_steps: int = 4, lr: float = 0.1) -> None:
        if local_steps < 1 or lr <= 0:
            raise InputError(f"local_steps and lr must be positive, got {local_steps} and {lr}")
        self.local_steps, self.lr = local_steps, lr

    def losses(self, run: "Adaptation", batch: Batch) -> Losses:
        if any(len(part["index"]) < self.local_steps for part in batch.values()):
            raise InputError(f"Alternate takes {self.local_steps} local steps: batch_size must be that per process")
        parameters = [p for _, p in run.learned() if p.requires_grad]
        start = [p.detach().clone() for p in parameters]
        ways = [torch.zeros_like(p) for p in start]
        losses: dict[str, Tensor] = {}
        entropies: dict[str, Tensor] = {}
        for task, part in batch.items():
            try:
                losses[task], entropy = self._tune(run, task, part, parameters)
                entropies.update(entropy)
            finally:
                with torch.no_grad():
                    for p, at, way in zip(parameters, start, ways, strict=True):
                        way.add_(at - p, alpha=1 / len(batch))
                        p.copy_(at)
        return dict(zip(losses, hand_on(ways, list(losses.values()), parameters), strict=True)), entropies

    def _tune(
        self, run: "Adaptation", task: str, part: dict[str, Tensor], parameters: list[torch.nn.Parameter]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The local steps of one task; its loss and entropy are those before the first."""
        pieces = {name: x.tensor_split(self.local_steps) for name, x in part.items()}
        first = None
        for number in range(self.local_steps):
            losses, entropies = run.losses({task: {name: piece[number] for name, piece in pieces.items()}})
            gradients = torch.autograd.grad(losses[task], parameters, materialize_grads=True)
            with torch.no_grad():
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.sub_(gradient, alpha=self.lr)
            first = first or (losses[task].detach(), entropies)
        assert first is not None
        return first


def shortest(gram: Tensor, iterations: int = 1000) -> Tensor:
    """argmin αᵀ G α over the simplex, α [T], for a Gram matrix G [T, T] of gradients.

    By Frank-Wolfe steps with exact line search and away steps, until the duality gap is below 1e-9 of the largest
    entry.
    """
    alpha = torch.full_like(gram[0], 1 / len(gram))
    tolerance = 1e-9 * float(gram.diagonal().max())
    for _ in range(iterations):
        slope = gram @ alpha
        towards, away = int(slope.argmin()), int(slope.masked_fill(alpha <= 0, -torch.inf).argmax())
        gaps = float(alpha @ slope - slope[towards]), float(slope[away] - alpha @ slope)
        if gaps[0] <= tolerance:
            break
        corner, most = torch.zeros_like(alpha), 1.0
        if gaps[0] >= gaps[1]:
            corner[towards] = 1
            direction = corner - alpha
        else:
            corner[away] = 1
            direction, most = alpha - corner, float(alpha[away] / (1 - alpha[away]).clamp(min=1e-300))
        curvature = float(direction @ gram @ direction)
        step = most if curvature <= 0 else min(most, -float(direction @ slope) / curvature)
        alpha = (alpha + step * direction).clamp(min=0)
        alpha = alpha / alpha.sum()
    return alpha


def average(run: "Adaptation", gradient: Tensor) -> Tensor:
    """A gradient over all processes' parts of a batch; DDP does so for those of its own backward pass alone."""
    if run._trainer is None or run.trainer.world_size == 1:
        return gradient
    mean: Tensor = run.trainer.strategy.reduce(gradient, reduce_op="mean")
    return mean
