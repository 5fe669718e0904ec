"""What the stages of a merge are: transforms of task vectors, one rule that combines them, corrections of the merge."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import AnyDeltas, LowRank, Sparse, changed
from adamerge.differences import PIECE, pieces
from adamerge.errors import InputError
from adamerge.kinds import kind
from adamerge.task_vectors import TaskVectors
from adamerge.threads import in_order, one_thread

Statistics = TypeVar("Statistics")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Stack:
    """One tensor of all models, or some consecutive rows of it: what a rule sees.

    Attributes:
        name: of the tensor.
        base: [*shape], in the dtype of the deltas.
        deltas: [K, *shape], in float32 or better.
        tasks: the K experts, in the order of the first axis.
        factors: of the deltas, where they are adapters' or a transform has left factors.
    """

    name: str
    base: Tensor
    deltas: Tensor
    tasks: tuple[str, ...]
    factors: LowRank | None = None

    @property
    def experts(self) -> Tensor:
        """θₖ = θ₀ + τₖ, [K, *shape]."""
        return self.base + self.deltas


class Rule(ABC, Generic[Statistics]):
    """Combines the K deltas of one tensor into one change of the base. Tensors are never changed in place.

    Attributes:
        elementwise: whether an entry of the outcome depends on the same entry of the deltas alone (and on what `fit`
            found): large tensors then go through in pieces.
        passes: how often `fit` reads all tensors; None for once if there is a `fit`, else not at all.
        keeps_statistics: whether running statistics are combined by this rule too, instead of averaged.
    """

    elementwise: bool = False
    passes: int | None = None
    keeps_statistics: ClassVar[bool] = False

    def check(self, tasks: tuple[str, ...]) -> None:
        """Raise InputError for experts that the rule cannot combine; called before any tensor is read."""

    def fit(self, task_vectors: TaskVectors) -> Statistics:
        """What `combine` must know of all tensors; nothing by default."""
        return None  # type: ignore[return-value]

    @abstractmethod
    def combine(self, stack: Stack, statistics: Statistics) -> Tensor:
        """The change of one tensor, [*shape]."""

    def merged(self, stack: Stack, statistics: Statistics, scale: float) -> Tensor:
        """The merged tensor: base + scale · combine(stack)."""
        return stack.base + scale * self.combine(stack, statistics)


class WeightRule(Rule[Statistics]):
    """A rule over the experts' weights themselves: its outcome does not follow from the task vectors alone.

    At another scale than 1 the merge lies on the line from the base to that outcome.
    """

    @abstractmethod
    def weights(self, stack: Stack, statistics: Statistics) -> Tensor:
        """The merged weights of one tensor, [*shape]."""

    def combine(self, stack: Stack, statistics: Statistics) -> Tensor:
        return self.weights(stack, statistics) - stack.base

    def merged(self, stack: Stack, statistics: Statistics, scale: float) -> Tensor:
        return torch.lerp(stack.base, self.weights(stack, statistics), scale)


class Changes(Iterable[tuple[Stack, Tensor]]):
    """Every parameter tensor (or pieces of it) before any transform, with its change so far: computed at each pass.

    Attributes:
        names: of these tensors.
        tasks: of the experts.
    """

    def __init__(
        self, names: tuple[str, ...], tasks: tuple[str, ...], again: Callable[[], Iterator[tuple[Stack, Tensor]]]
    ) -> None:
        self.names, self.tasks, self._again = names, tasks, again

    def __iter__(self) -> Iterator[tuple[Stack, Tensor]]:
        return self._again()


class Folds(ABC):
    """What a rule can do whose outcome for n + 1 experts follows from that for n and from one more (see `Fold`)."""

    @abstractmethod
    def add(self, change: Tensor, delta: Tensor, count: int, name: str) -> Tensor:
        """The change that `count` experts and one more are combined to; twice as large where both arguments are.

        Args:
            change: that of the `count` experts, [*shape].
            delta: of the expert that joins them, [*shape].
            count: how many were there before.
            name: of the tensor.
        """


class Correction(ABC, Generic[Statistics]):
    """Changes what a rule has combined, in view of the task vectors as they were before any transform.

    Attributes:
        elementwise: as in `Rule`.
        scaled: whether what it makes of a change depends on the change's length: it then sees it times the scale.
    """

    elementwise: bool = False
    passes: int | None = None
    scaled: ClassVar[bool] = False

    def fit(self, changes: Changes) -> Statistics:
        """What `correct` must know of all tensors and their changes; nothing by default."""
        return None  # type: ignore[return-value]

    @abstractmethod
    def correct(self, stack: Stack, change: Tensor, statistics: Statistics) -> Tensor:
        """The corrected change of one tensor, [*shape]."""


class Transform(ABC):
    """Makes other task vectors out of task vectors, expert by expert, before anything combines them.

    Arguments are never changed. Tasks, ties and fingerprints are those of the experts that went in, so that what is
    learned on transformed task vectors is tied to files that exist.

    Attributes:
        sums: whether Στ of the outcome is a merge; `adamerge.merge` then takes the transform as the last of its rules.
        per_task: whether θ₀ + τₖ of the outcome stands for expert k in less memory, and the sum for nothing.
        thins: whether small entries are dropped by their magnitude.
        draws: whether entries are dropped at random: among the others, few are left to be told apart by magnitude.
        votes: whether the experts have voted on each entry: what is dropped later has already been counted.
    """

    sums: ClassVar[bool] = True
    per_task: ClassVar[bool] = False
    thins: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    votes: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, task_vectors: TaskVectors) -> TaskVectors:
        """The transformed task vectors."""


class PerTensor(Transform, Generic[Statistics]):
    """A transform of one parameter tensor at a time, after a first pass for what it must know of all of them.

    Only parameters that some expert changed are transformed: running statistics and constants stay. What `fit` finds
    is handed to `tensor` and kept nowhere else, so that one object serves any number of task vectors. Task vectors over
    files are read once for `fit` and then tensor by tensor, when one is asked for.

    Attributes:
        elementwise: whether an entry of the outcome depends on the same entry of the deltas alone (and on what `fit`
            found): large tensors then go through in pieces.
    """

    elementwise: bool = False
    passes: int | None = None

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
            return self.tensor(name, deltas, statistics) if parameter and changed(deltas) else deltas

        return task_vectors.changed(change, elementwise=self.elementwise)


def each_expert(deltas: AnyDeltas, change: Callable[[int, Tensor], Tensor]) -> AnyDeltas:
    """`change(k, τₖ)` in the place of every τₖ [*shape], one after the other; sparse deltas stay sparse."""
    changed = torch.empty(deltas.shape, dtype=deltas.dtype, device=deltas.device)
    for k, delta in enumerate(deltas):
        changed[k] = change(k, delta)
    return Sparse.from_dense(changed) if isinstance(deltas, Sparse) else changed


def entrywise(work: Callable[[Tensor], Tensor], deltas: Tensor) -> Tensor:
    """`work`, which makes [m] of [K, m] entry by entry, on all entries of [K, *shape] -> [*shape].

    Those of a large tensor on a CPU come some at a time, in several threads: what is in between stays in its caches.
    """
    flat, shape = deltas.reshape(len(deltas), -1), deltas.shape[1:]
    if flat.shape[1] <= PIECE or flat.device.type != "cpu":
        return work(flat).view(shape)
    with one_thread():
        return torch.cat(list(in_order(work, flat.split(PIECE, 1)))).view(shape)


def parameters(task_vectors: TaskVectors, names: Collection[str] | None = None) -> Iterator[tuple[str, AnyDeltas]]:
    """Name and deltas of every parameter tensor, or of those named; large ones in pieces, where these can be had.

    Tied tensors come once, under the name that `task_vectors.deltas` has.
    """
    return each_parameter(task_vectors, lambda name, deltas: (name, deltas), names)


def each_parameter(
    task_vectors: TaskVectors,
    work: Callable[[str, AnyDeltas], Found],
    names: Collection[str] | None = None,
    backwards: bool = False,
) -> Iterator[Found]:
    """What `work` makes of each of `parameters`, in their order; in several threads where they are read from files.

    A pass that goes `backwards` over the tensors begins with those that the pass before it has read last, and ends with
    those that the next one, or the merge, begins with: the page cache holds them still, as far as memory goes.
    """
    order = reversed(list(task_vectors.deltas)) if backwards else task_vectors.deltas
    likes = ((name, meta(task_vectors.base, name)) for name in order if names is None or name in names)
    parts = (
        (name, rows)
        for name, like in likes
        if kind(name, like) == "parameter"
        for rows in (pieces(like.shape) if task_vectors.elementwise else (None,))
    )
    if task_vectors.lazy and task_vectors.elementwise:
        yield from in_order(lambda part: work(part[0], task_vectors.piece(*part)[1]), parts)
    else:
        yield from (work(name, task_vectors.piece(name, rows)[1]) for name, rows in parts)


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
    voted = drawn = None
    for step in transforms:
        name = type(step).__name__
        if not isinstance(step, Transform):
            does = "corrects a merge" if isinstance(step, Correction) else "combines the experts"
            raise InputError(f"{name} {does}: it transforms no task vectors")
        if voted and (step.thins or step.draws):
            raise InputError(f"{name} after {voted} drops entries that have voted: put {name} before {voted}")
        if drawn and (step.thins or step.draws):
            raise InputError(
                f"{name} after {drawn}, which has left few entries: the largest of them are a matter of chance, and a "
                f"threshold may be 0 and keep everything; leave out one of the two"
            )
        voted, drawn = name if step.votes else voted, name if step.draws else drawn
