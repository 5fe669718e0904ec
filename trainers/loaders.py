"""What feeds a run: batches in their order, from wherever the run stands, and all images of data sets to score."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge import InputError
from adamerge.data import fetch_readable
from trainers.loading import load
from trainers.placing import placed
from trainers.steps import Steps


class EvalChunks(Dataset[tuple[Tensor, Tensor]]):
    """Item i is the i-th run of images, in order, with labels; each process takes every `world`-th of them."""

    def __init__(self, dataset: Dataset[Any], batch_size: int, shard: tuple[int, int] = (0, 1)) -> None:
        self.dataset, self.batch_size, self.shard = dataset, batch_size, shard

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)  # type: ignore[arg-type]

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor]:
        rank, world = self.shard
        stop = min((chunk + 1) * self.batch_size, len(self.dataset))  # type: ignore[arg-type]
        places = torch.arange(chunk * self.batch_size, stop)[rank::world]
        _, images, labels = fetch_readable(self.dataset, places)
        return images, labels

    @property
    def at_hand(self) -> bool:
        """Whether there is nothing to load, since images stay where they are used."""
        near = placed(self.dataset)
        return near is not None and near.keep

    def arrived(self, item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """An item that a worker process gave, as this one would have."""
        near = placed(self.dataset)
        return (near.floats(item[0]) if near else item[0]), item[1]


class StepLoader:
    """Loads items in order, with worker processes or without, from the first one that is still to do.

    Not a DataLoader itself, because Lightning must not put its own sampler in place of the steps. It says that it can
    resume, and does: wherever an iteration begins, it goes on at `first()`.

    Args:
        items: whose items are whole batches.
        count: how many there are in all.
        num_workers: worker processes; 0 loads in this one.
        first: the first item of an iteration, asked when it begins.
    """

    def __init__(
        self, items: Steps | EvalChunks, count: int, num_workers: int, first: Callable[[], int] = lambda: 0
    ) -> None:
        self.items, self.count, self.num_workers, self.first = items, count, num_workers, first

    def __iter__(self) -> Iterator[Any]:
        workers = 0 if self.items.at_hand else self.num_workers
        loaded = load(self.items, range(self.first(), self.count), workers)
        return map(self.items.arrived, loaded) if workers else loaded

    def __len__(self) -> int:
        return self.count

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position follows from the trainer's step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def training_loader(trainer: L.Trainer, steps: Steps, num_workers: int) -> StepLoader:
    """All the batches of a run; one that resumes begins at the first batch after its last optimiser step."""
    if steps.batch_size % trainer.world_size:
        raise InputError(f"batch_size {steps.batch_size} does not divide by the {trainer.world_size} processes")
    if trainer.max_steps < 1:
        raise InputError("a stream has no end: set trainer.max_steps to a positive number")
    per_step = trainer.accumulate_grad_batches
    count = trainer.max_steps * per_step
    return StepLoader(steps, min(count, steps.count or count), num_workers, lambda: trainer.global_step * per_step)


def scoring_loaders(
    trainer: L.Trainer, datasets: Iterable[Dataset[Any]], batch_size: int, num_workers: int
) -> list[StepLoader]:
    """One loader per data set, over all its images, shared out among the processes."""
    chunks = (EvalChunks(dataset, batch_size, (trainer.global_rank, trainer.world_size)) for dataset in datasets)
    return [StepLoader(chunk, len(chunk), num_workers) for chunk in chunks]
