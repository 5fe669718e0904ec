"""Frank-Wolfe merging: of all experts, those that the loss falls towards."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.observing import Measure
from adamerge.rules.base import Rule, Stack
from adamerge.statistics import Informed, Statistics


class FwMerging(Informed, Rule[Statistics]):
    """FW-Merging (arXiv:2503.12649): a merge in the hull of the experts, found by Frank-Wolfe steps on a loss.

    θ₀ + Σₖ λₖ τₖ with λ on the simplex, from the mean of the experts. At every step, the linear minimisation oracle
    picks the expert that the loss falls towards most steeply, s = argminₖ ⟨∇L, τₖ⟩, and λ goes to e_s by 2 / (t + 2) of
    the way, t = 0, 1, … It stays where no expert is better. L is the mean over tasks of the cross-entropy of some
    labelled examples. Experts that no step picks have no part in the merge: a pool may hold more than the tasks need.
    Tensors without a share are averaged. Needs labels. `trainers.FrankWolfe` takes the same steps on a stream.

    Args:
        statistics: with the "share" of every expert (`adamerge.selecting.select`), or a folder of them.
        steps: how many. The first one goes all the way to one expert.
        per: whether each tensor has a λ of its own, or the whole model one.
    """

    measures: ClassVar[tuple[Measure, ...]] = ("share",)
    labelled = True
    elementwise = True

    def __init__(
        self,
        statistics: Statistics | str | Path | None = None,
        steps: int = 10,
        per: Literal["tensor", "model"] = "tensor",
    ) -> None:
        if steps < 1:
            raise InputError(f"expected steps from 1 on in FwMerging, got {steps}")
        self.statistics, self.steps, self.per = statistics, steps, per

    def fit(self, task_vectors: object) -> Statistics:
        """The statistics, opened."""
        return self.opened()

    def combine(self, stack: Stack, statistics: Statistics) -> Tensor:
        found = [statistics.find("share", task, stack.name) for task in stack.tasks]
        present = [share for share in found if share is not None]
        if not present:
            return stack.deltas.mean(0)
        if len(present) < len(found):
            raise InputError(f"{stack.name} has no share of some expert: select among these experts again")
        return torch.tensordot(torch.stack(present).to(stack.deltas), stack.deltas, 1)
