"""Prequential accuracy: every image of a stream that passes once is predicted before it is adapted on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from adamerge.data import labels_of
from adamerge.watching import evaluating
from trainers.evaluation import Accuracy
from trainers.steps import Batch
from trainers.streams import Stream

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation

#: Windows that a run is divided into.
WINDOWS = 40


class Prequential:
    """Counts, in windows of steps, how many images of each task came and how many were predicted rightly.

    Attributes:
        counts: int64 [windows, 3, T]: images; right; right with the task given.
    """

    def __init__(self) -> None:
        self.counts: list[Tensor] = []
        self._open: Tensor | None = None
        self._batches, self._window = 0, 0
        self._labels: dict[str, Tensor] = {}

    def predict(self, trainer: L.Trainer, run: "Adaptation", batch: Batch) -> None:
        """Score a batch by what has been learned before it."""
        tasks = run.suite.tasks
        counts = torch.zeros(3, len(tasks), dtype=torch.int64, device=run.device)
        with evaluating(run), trainer.precision_plugin.forward_context():
            passed = run.passing(batch)
            for task, part in batch.items():
                view, labels = run.view(task, part, passed), self._labels_of(trainer, task)[part["index"].cpu()]
                right, given = (x.argmax(-1) == labels.to(x.device) for x in (run.answers(view), view.logits))
                found = torch.tensor(len(labels)), right.sum(), given.sum()
                counts[:, tasks.index(task)] = torch.stack([each.to(run.device) for each in found])
        self._add(trainer, trainer.strategy.reduce(counts, reduce_op="sum"))

    def _add(self, trainer: L.Trainer, counts: Tensor) -> None:
        self._window = self._window or max(1, int(trainer.num_training_batches) // WINDOWS)
        self._open = counts.cpu() if self._open is None else self._open + counts.cpu()
        self._batches += 1
        if self._batches % self._window == 0:
            self.counts.append(self._open)
            self._open = None

    def _labels_of(self, trainer: L.Trainer, task: str) -> Tensor:
        if task not in self._labels:
            stream: Stream = trainer.datamodule  # type: ignore[attr-defined]
            self._labels = {name: labels_of(dataset) for name, dataset in stream.steps().datasets.items()}
        return self._labels[task]

    # -- what came of it -----------------------------------------------------------------------------------------------

    def table(self) -> Tensor:
        """int64 [windows, 3, T], with the window that is still open."""
        rows = self.counts if self._open is None else [*self.counts, self._open]
        return torch.stack(rows) if rows else torch.zeros(0, 3, 0, dtype=torch.int64)

    def accuracy(self, tasks: tuple[str, ...], given: bool = False) -> Accuracy:
        """Over all images so far, of the tasks that came; with or without the task given."""
        seen, *right = self.table().sum(0)
        return {t: float(right[given][k] / seen[k]) for k, t in enumerate(tasks) if seen[k]}

    def curves(self, tasks: tuple[str, ...]) -> dict[str, Any]:
        """Accuracy over the images that came: per window and cumulative, by task and over all images of all tasks."""
        table = self.table()
        found = {}
        for name, counts in (("windowed", table), ("cumulative", table.cumsum(0))):
            own = {t: _ratio(counts[:, 1, k], counts[:, 0, k]) for k, t in enumerate(tasks)}
            total = counts.sum(2)
            found[name] = {**own, "all images": _ratio(total[:, 1], total[:, 0])}
            found[f"{name}, task given"] = {"all images": _ratio(total[:, 2], total[:, 0])}
        return {"images": table[:, 0].sum(1).cumsum(0).tolist(), **found}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"counts": list(self.counts), "open": self._open, "batches": self._batches, "window": self._window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.counts, self._open = list(state["counts"]), state["open"]
        self._batches, self._window = state["batches"], state["window"]


def _ratio(right: Tensor, seen: Tensor) -> list[float | None]:
    """Shares; none where nothing came."""
    return [int(r) / int(n) if n else None for r, n in zip(right, seen, strict=True)]
