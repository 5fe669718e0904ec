"""In which order a stream's images come, and the batches of a stream that passes once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge import InputError
from adamerge.data import labels_of
from trainers.seeding import generator
from trainers.steps import Batch, Steps


class Order(ABC):
    """The order of the images of all tasks in a stream that passes once: a pure function of its arguments.

    An order that looks at labels simulates a stream; a run is told no more of them than without.
    """

    @abstractmethod
    def arrange(self, tasks: Tensor, labels: Callable[[], Tensor], rng: torch.Generator) -> Tensor:
        """Positions of images in the order they come in, each at most once, int64 [M].

        `tasks` int64 [N] says of which task each image is, in ascending order; `labels()` int64 [N] of which class,
        counted through all tasks.
        """


class Shuffled(Order):
    """All images in a random order."""

    def arrange(self, tasks: Tensor, labels: Callable[[], Tensor], rng: torch.Generator) -> Tensor:
        return torch.randperm(len(tasks), generator=rng)


class TaskBlocks(Order):
    """One task after another, its images shuffled.

    Args:
        rounds: every task comes back so many times, each time with another part of its images (a recurring stream).
    """

    def __init__(self, rounds: int = 1) -> None:
        _positive(rounds=rounds)
        self.rounds = rounds

    def arrange(self, tasks: Tensor, labels: Callable[[], Tensor], rng: torch.Generator) -> Tensor:
        shuffled = [own[torch.randperm(len(own), generator=rng)] for own in _groups(tasks)]
        parts = [own.tensor_split(self.rounds) for own in shuffled]
        return torch.cat([part[number] for number in range(self.rounds) for part in parts])


class Drifting(Order):
    """A mixture of tasks that drifts from the first task to the last.

    An image of task k of K comes at the time (k + ½) / K + w n, n ~ N(0, 1): 0 is one task after another, and the wider
    the more the tasks mix.

    Args:
        width: w, as a fraction of the stream.
    """

    def __init__(self, width: float = 0.1) -> None:
        if width < 0:
            raise InputError(f"width is a fraction of the stream, at least 0, not {width}")
        self.width = width

    def arrange(self, tasks: Tensor, labels: Callable[[], Tensor], rng: torch.Generator) -> Tensor:
        count = int(tasks.max()) + 1
        shuffled = torch.randperm(len(tasks), generator=rng)
        noise = torch.randn(len(tasks), generator=rng, dtype=torch.float64)
        times = (tasks[shuffled] + 0.5) / count + self.width * noise
        return shuffled[times.argsort(stable=True)]


class Joining(Order):
    """Tasks join one after another and stay: the images of those that are there come mixed.

    Where too few images are left for the place at which the next task joins, it joins earlier.

    Args:
        starts: for each task, in the order in which the stream has them, at which fraction of the stream it joins;
            default: task k of K at k / K.
    """

    def __init__(self, starts: list[float] | None = None) -> None:
        if starts and (min(starts) != 0 or max(starts) >= 1):
            raise InputError(f"starts are fractions of a stream in [0, 1), the first of them 0, not {starts}")
        self.starts = starts

    def arrange(self, tasks: Tensor, labels: Callable[[], Tensor], rng: torch.Generator) -> Tensor:
        own = _groups(tasks)
        starts = self.starts or [k / len(own) for k in range(len(own))]
        if len(starts) != len(own):
            raise InputError(f"starts has {len(starts)} fractions for {len(own)} tasks")
        times, waiting, parts = sorted(set(starts)), tasks[:0], list[Tensor]()
        for time, until in zip(times, [*times[1:], 1.0], strict=True):
            waiting = torch.cat([waiting, *(each for each, start in zip(own, starts, strict=True) if start == time)])
            waiting = waiting[torch.randperm(len(waiting), generator=rng)]
            count = round(until * len(tasks)) - sum(len(part) for part in parts) if until < 1 else len(waiting)
            parts.append(waiting[:count])
            waiting = waiting[count:]
        return torch.cat(parts)


class ClassCorrelated(Order):
    """Images of a class come close together, as the frames of a film do (NOTE, arXiv:2208.05117).

    The stream is a sequence of as many slots as there are classes; the images of every class are dealt out to them in
    shares ~ Dirichlet(δ, ..., δ), and shuffled within a slot.

    Args:
        delta: δ: the smaller, the fewer slots a class is in; large ones shuffle.
    """

    def __init__(self, delta: float = 0.1) -> None:
        if delta <= 0:
            raise InputError(f"delta must be positive, got {delta}")
        self.delta = delta

    def arrange(self, tasks: Tensor, labels: Callable[[], Tensor], rng: torch.Generator) -> Tensor:
        classes = _groups(labels())
        slots: list[list[Tensor]] = [[] for _ in classes]
        draw = np.random.default_rng(rng.initial_seed())  # torch has no Dirichlet with a generator of its own
        for own in classes:
            shares = draw.dirichlet([self.delta] * len(slots))
            ends = torch.from_numpy((shares.cumsum()[:-1] * len(own)).round().clip(0, len(own)).astype(np.int64))
            parts = own[torch.randperm(len(own), generator=rng)].tensor_split(ends)
            for slot, part in zip(slots, parts, strict=True):
                slot.append(part)
        joined = [torch.cat(parts) for parts in slots]
        return torch.cat([slot[torch.randperm(len(slot), generator=rng)] for slot in joined])


class ClassBlocks(Order):
    """The classes that appear change: every task's are dealt out to some parts of the stream, one part after another.

    Args:
        parts: how many.
        shown: so many of the first parts come, and the other classes never; default: all.
    """

    def __init__(self, parts: int = 2, shown: int | None = None) -> None:
        _positive(parts=parts, shown=parts if shown is None else shown)
        self.parts, self.shown = parts, parts if shown is None else shown

    def arrange(self, tasks: Tensor, labels: Callable[[], Tensor], rng: torch.Generator) -> Tensor:
        names = labels()
        part_of = torch.empty_like(names)
        for own in _groups(tasks):
            classes = names[own].unique()
            dealt = torch.randperm(len(classes), generator=rng) % self.parts
            part_of[own] = dealt[torch.searchsorted(classes, names[own])]
        shuffled = torch.randperm(len(tasks), generator=rng)
        in_order = shuffled[part_of[shuffled].argsort(stable=True)]
        return in_order[part_of[in_order] < self.shown]


class OrderedSteps(Steps):
    """A stream that passes once: item `step` is its next `batch_size` images, of whatever tasks they are.

    Of each batch, a process takes every `world`-th image. The last batch takes what is left, however little, but never
    less than an image for every process. A "weight" comes with each image, such that the weighted sum of the losses is
    their mean over the batch times the number of tasks, whatever their shares and however processes share it out.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset[Any]],
        order: Order,
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
        labels: bool = False,
        known: Sequence[range] = (),
    ) -> None:
        super().__init__(datasets, batch_size, labels, known)
        self.shard, (self.task_of, self.positions) = shard, arranged(datasets, order, seed)
        if len(self.task_of) < shard[1]:
            raise InputError(f"a stream of {len(self.task_of)} images is too short for {shard[1]} processes")

    @property
    def count(self) -> int:
        return max(1, -(-(len(self.task_of) - self.shard[1] + 1) // self.batch_size))

    def indices_of(self, step: int) -> dict[str, Tensor]:
        places = self._places(step)[self.shard[0] :: self.shard[1]]
        number, position = self.task_of[places], self.positions[places]
        tasks = list(self.datasets)
        return {tasks[int(k)]: position[number == k] for k in number.unique()}

    def __getitem__(self, step: int) -> Batch:
        batch = super().__getitem__(step)
        share = len(self.datasets) * self.shard[1] / len(self._places(step))
        for part in batch.values():
            part["weight"] = torch.full((len(part["index"]),), share)
        return batch

    def all_indices(self, task: str, start: int, end: int, per_step: int = 1) -> Tensor:
        first, last = start * per_step, min(end * per_step, self.count)
        if task not in self.datasets or first >= last:
            return torch.empty(0, dtype=torch.int64)
        places = torch.arange(first * self.batch_size, self._end(last - 1))[self.shard[0] :: self.shard[1]]
        own = self.task_of[places] == list(self.datasets).index(task)
        return self.positions[places[own]].sort().values

    def _places(self, step: int) -> Tensor:
        """Places in the stream of a batch, over all processes."""
        return torch.arange(step * self.batch_size, self._end(step))

    def _end(self, step: int) -> int:
        """The first place after a batch."""
        return len(self.task_of) if step == self.count - 1 else (step + 1) * self.batch_size


def arranged(datasets: Mapping[str, Dataset[Any]], order: Order, seed: int) -> tuple[Tensor, Tensor]:
    """For each place in the stream, the number of the task and the position in its data set."""
    sizes = torch.tensor([len(dataset) for dataset in datasets.values()])  # type: ignore[arg-type]
    starts = sizes.cumsum(0) - sizes
    tasks = torch.arange(len(sizes)).repeat_interleave(sizes)

    def labels() -> Tensor:
        own = [labels_of(dataset) for dataset in datasets.values()]
        most = 1 + max(int(each.max()) for each in own)
        return torch.cat([each + number * most for number, each in enumerate(own)])

    places = order.arrange(tasks, labels, generator(seed, "order"))
    return tasks[places], places - starts[tasks[places]]


def _groups(numbers: Tensor) -> list[Tensor]:
    """The positions of each number that occurs, ascending."""
    return [(numbers == number).nonzero().squeeze(1) for number in numbers.unique()]


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be positive, got {count}")
