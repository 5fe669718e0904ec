"""How the task of an image is found where nobody tells it."""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from adamerge import InputError
from adamerge.data import fetch
from adamerge.fingerprint import BASE
from adamerge.objectives import entropy
from modules import View
from trainers.phases import ExpertOutputs
from trainers.seeding import generator
from trainers.steps import Batch

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation


class TaskFinder(ABC):
    """Says of which task images are."""

    #: What it is told, as an objective's.
    needs: frozenset[str] = frozenset()

    @abstractmethod
    def __call__(self, run: "Adaptation", view: View) -> Tensor:
        """[B] positions among the tasks of the suite."""

    def check(self, run: "Adaptation") -> None:  # noqa: B027  most finders suit every run
        """Raise InputError for a run that it does not suit."""


class ByRouter(TaskFinder):
    """The task whose expert a router of tasks, such as `modules.FeatureRouter`, holds to be most likely."""

    def __call__(self, run: "Adaptation", view: View) -> Tensor:
        tasks, experts = run.suite.tasks, run.merged.tasks
        task_of = torch.tensor([tasks.index(name) if name in tasks else -1 for name in experts])
        return task_of.to(view.task_logits.device)[view.task_logits.argmax(1)]

    def check(self, run: "Adaptation") -> None:
        if run.router is None or not run.router.knows_tasks:
            raise InputError(
                "task_id 'inferred' needs a router that knows tasks, such as modules.FeatureRouter, or another finder, "
                "such as trainers.ByEntropy"
            )
        if odd := [task for task in run.suite.tasks if task not in run.suite.experts]:
            raise InputError(
                f"a router finds the expert of an image, and task {odd[0]!r} has none: set task_id to given"
            )


class ByEntropy(TaskFinder):
    """The task whose head is surest: argmin_t H(softmax(head_t(z))) / log C_t."""

    def __call__(self, run: "Adaptation", view: View) -> Tensor:
        inside = run.correction is not None and run.correction.inside
        apart = inside or (run.router is not None and run.router.mixes == "tasks")
        doubts = []
        for task in run.suite.tasks:
            logits = (run.view(task, view.part) if apart else view.taken_as(task)).logits
            doubts.append(entropy(logits) / math.log(max(logits.shape[-1], 2)))
        return torch.stack(doubts).argmin(0)


class ByPrototype(TaskFinder):
    """The task whose images look most alike to the base: argmax_t cos(z − z̄, p_t − z̄).

    z are features of the base, p_t their mean over some training images of task t, and z̄ the mean of the p_t.

    Args:
        images: how many of each task.
    """

    needs = frozenset({"task id", "train data"})

    def __init__(self, images: int = 64) -> None:
        if images < 1:
            raise InputError(f"a prototype is the mean of one or more images, not {images}")
        self.images = images
        self._base: ExpertOutputs | None = None
        self._prototypes = torch.empty(0)

    def __call__(self, run: "Adaptation", view: View) -> Tensor:
        if self._base is None:
            self._base = ExpertOutputs(run.suite, False, run.device)
            self._prototypes = torch.stack([self._prototype(run, task) for task in run.suite.tasks])
        centre = self._prototypes.mean(0)
        directions = [
            F.normalize(x - centre, dim=1) for x in (self._base(BASE, view.part["images"])[0], self._prototypes)
        ]
        return (directions[0] @ directions[1].T).argmax(1)

    def _prototype(self, run: "Adaptation", task: str) -> Tensor:
        assert self._base is not None
        dataset = run.suite.dataset(task, "train")
        order = torch.randperm(len(dataset), generator=generator("prototype", task))  # type: ignore[arg-type]
        return self._base(BASE, fetch(dataset, order[: self.images])[0].to(run.device))[0].mean(0)


def regrouped(run: "Adaptation", batch: Batch, found: dict[str, Tensor]) -> Batch:
    """A batch by the tasks found, [b] positions for each of its parts, instead of those that it comes with."""
    numbers = torch.cat(list(found.values()))
    names = next(iter(batch.values()))
    whole = {name: torch.cat([part[name] for part in batch.values()]) for name in names}
    tasks = run.suite.tasks
    return {
        tasks[number]: {name: x[numbers.to(x.device) == number] for name, x in whole.items()}
        for number in sorted(set(numbers.tolist()))
    }
