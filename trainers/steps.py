"""Batches of a stream by step."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data import fetch, fetch_readable, labels_of
from trainers.placing import placed

#: Images and their positions in the data set, by task.
Batch = dict[str, dict[str, Tensor]]


class Steps(Dataset[Batch], ABC):
    """Item `step` is that step's batch: `{task: {"images": [b, 3, H, W], "index": [b]}}`, and "labels" if asked for.

    In the steps `known`, images are left out. So are those that cannot be read, where a data set allows that
    (`adamerge.data.Substituted`), and tasks of which nothing is left.
    """

    def __init__(
        self, datasets: Mapping[str, Dataset[Any]], batch_size: int, labels: bool, known: Sequence[range]
    ) -> None:
        self.datasets, self.batch_size, self.labels, self.known = datasets, batch_size, labels, known

    @property
    def count(self) -> int | None:
        """How many batches there are; none where there is no end."""
        return None

    def __getitem__(self, step: int) -> Batch:
        batch = {}
        for task, index in self.indices_of(step).items():
            dataset = self.datasets[task]
            if any(step in steps for steps in self.known):
                images, labels = torch.empty(len(index), 0), labels_of(dataset)[index] if self.labels else index
            else:
                index, images, labels = fetch_readable(dataset, index)
            if not len(index):
                continue
            batch[task] = {"index": index, "images": images}
            if self.labels:
                batch[task]["labels"] = labels
        return batch

    @property
    def at_hand(self) -> bool:
        """Whether there is nothing to load, since images stay where they are used."""
        near = map(placed, self.datasets.values())
        return all(each is not None and each.keep for each in near)

    def arrived(self, batch: Batch) -> Batch:
        """A batch that a worker process gave, as this one would have."""
        near = {task: placed(self.datasets[task]) for task in batch}
        parts = ((task, part, near[task]) for task, part in batch.items())
        return {task: {**part, "images": on.floats(part["images"])} if on else part for task, part, on in parts}

    @abstractmethod
    def indices_of(self, step: int) -> dict[str, Tensor]:
        """Positions of this process's images of a step, by task."""

    @abstractmethod
    def all_indices(self, task: str, start: int, end: int, per_step: int = 1) -> Tensor:
        """Positions of all the images of one task in the optimiser steps from `start` to `end`, sorted."""


class Untold(Steps):
    """Steps of which a run is not told the tasks of the images: positions are among the images of all tasks together.

    The tasks that a batch comes with are for scoring alone. Any image may be taken to be of any of `tasks`.
    """

    def __init__(self, steps: Steps, tasks: Sequence[str]) -> None:
        whole = Together(list(steps.datasets.values()))
        super().__init__(dict.fromkeys(tasks, whole), steps.batch_size, steps.labels, steps.known)
        self.steps, self.starts = steps, dict(zip(steps.datasets, whole.starts.tolist(), strict=True))

    @property
    def count(self) -> int | None:
        return self.steps.count

    def __getitem__(self, step: int) -> Batch:
        batch = self.steps[step]
        return {task: {**part, "index": part["index"] + self.starts[task]} for task, part in batch.items()}

    @property
    def at_hand(self) -> bool:
        return self.steps.at_hand

    def arrived(self, batch: Batch) -> Batch:
        return self.steps.arrived(batch)

    def indices_of(self, step: int) -> dict[str, Tensor]:
        return {task: index + self.starts[task] for task, index in self.steps.indices_of(step).items()}

    def all_indices(self, task: str, start: int, end: int, per_step: int = 1) -> Tensor:
        own = [self.steps.all_indices(name, start, end, per_step) + first for name, first in self.starts.items()]
        return torch.cat(own)


class Together(Dataset[tuple[Tensor, int]]):
    """Several data sets as one, one after another."""

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        self.datasets = datasets
        sizes = torch.tensor([len(dataset) for dataset in datasets])  # type: ignore[arg-type]
        self.ends = sizes.cumsum(0)
        self.starts = self.ends - sizes

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(torch.tensor([index]))
        return images[0], int(labels)

    @property
    def labels(self) -> Tensor:
        """Labels [N], each within its own task."""
        return torch.cat([labels_of(dataset) for dataset in self.datasets])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As `adamerge.data.fetch`."""
        which = torch.searchsorted(self.ends, indices, right=True)
        order = which.argsort(stable=True)
        parts = [fetch(self.datasets[k], indices[which == k] - self.starts[k]) for k in which.unique().tolist()]
        images, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        back = order.argsort()
        return images[back], labels[back]
