"""What a merging rule is, and what a transform of task vectors is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import AnyDeltas
from adamerge.errors import InputError
from adamerge.kinds import kind
from adamerge.task_vectors import TaskVectors

Statistics = TypeVar("Statistics")


class Rule(ABC):
    """Combines the K deltas of one tensor into one change of the base. Tensors are never changed in place."""

    @abstractmethod
    def combine(self, name: str, deltas: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """[K, *shape] deltas of tensor `name`, in the order of `tasks` -> [*shape]."""

    def apply(self, name: str, base: Tensor, deltas: Tensor, tasks: tuple[str, ...], scale: float) -> Tensor:
        """The merged tensor: base + scale · combine(deltas)."""
        return base + scale * self.combine(name, deltas, tasks)


class Transform(ABC):
    """Makes other task vectors out of task vectors, expert by expert, before anything combines them.

    Arguments are never changed. Tasks, ties and fingerprints are those of the experts that went in, so that what is
    learned on transformed task vectors is tied to files that exist.

    Attributes:
        sums: whether Στ of the outcome is a merge; `adamerge.merge` then takes the transform as the last of its rules.
        thins: whether small entries are dropped by their magnitude.
        votes: whether the experts have voted on each entry: what is dropped later has already been counted.
    """

    sums: ClassVar[bool] = True
    thins: ClassVar[bool] = False
    votes: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, task_vectors: TaskVectors) -> TaskVectors:
        """The transformed task vectors."""


class PerTensor(Transform, Generic[Statistics]):
    """A transform of one parameter tensor at a time, after a first pass for what it must know of all of them.

    Only parameters that some expert changed are transformed: running statistics and constants stay. What `fit` finds
    is handed to `tensor` and kept nowhere else, so that one object serves any number of task vectors. Task vectors over
    files are read once for `fit` and then tensor by tensor, when one is asked for.
    """

    def fit(self, task_vectors: TaskVectors) -> Statistics:
        """What `tensor` must know of all tensors; nothing by default."""
        return None  # type: ignore[return-value]

    @abstractmethod
    def tensor(self, name: str, deltas: AnyDeltas, statistics: Statistics) -> AnyDeltas:
        """The new deltas of parameter `name`, [K, *shape] as before."""

    @torch.no_grad()
    def __call__(self, task_vectors: TaskVectors) -> TaskVectors:
        statistics = self.fit(task_vectors)

        @torch.no_grad()
        def change(name: str, deltas: AnyDeltas) -> AnyDeltas:
            parameter = kind(name, meta(task_vectors.base, name)) == "parameter"
            return self.tensor(name, deltas, statistics) if parameter and bool(deltas.any()) else deltas

        return task_vectors.changed(change)


def parameters(task_vectors: TaskVectors) -> Iterator[tuple[str, AnyDeltas]]:
    """Name and deltas of every parameter tensor, one at a time; tied tensors once."""
    for name in task_vectors.deltas:
        if kind(name, meta(task_vectors.base, name)) == "parameter":
            yield name, task_vectors.deltas[name]


def transform(task_vectors: TaskVectors, transforms: Sequence[Transform]) -> TaskVectors:
    """Apply transforms in order; the argument is not changed.

    Raises:
        InputError: for something that is no transform, and for entries dropped after the experts have voted on them.
    """
    check_transforms(transforms)
    for step in transforms:
        task_vectors = step(task_vectors)
    return task_vectors


def check_transforms(transforms: Sequence[object]) -> None:
    """Raise InputError for what `transform` does not take."""
    voted = None
    for step in transforms:
        if not isinstance(step, Transform):
            raise InputError(f"{type(step).__name__} combines the experts: it transforms no task vectors")
        if voted and step.thins:
            dropping = type(step).__name__
            raise InputError(f"{dropping} after {voted} drops entries that have voted: put {dropping} before {voted}")
        voted = type(step).__name__ if step.votes else voted
