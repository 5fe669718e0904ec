"""Predictions of images as they come, adapting to them or not."""

import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO, cast

import lightning as L
import torch
from torch import Tensor

from adamerge import InputError
from adamerge.watching import evaluating
from trainers.adaptation import Adaptation
from trainers.corrupting import preprocess_of
from trainers.finding import regrouped
from trainers.sources import Item
from trainers.steps import Batch

#: More steps than any run takes: images come without an end.
ENDLESS = 10**9


class Incoming(L.LightningDataModule):
    """Batches of a source's images, of one task or of tasks that nobody tells.

    Args:
        source: names and images.
        batch_size: images that are waited for before they are predicted.
        task: of which task they are; default: nobody knows.
    """

    def __init__(self, source: Iterable[Item], batch_size: int, task: str | None) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"batch_size must be positive, got {batch_size}")
        self.source, self.batch_size, self.task, self.task_known = source, batch_size, task, task is not None
        self.names: list[str] = []

    def batches(self, run: Adaptation) -> Iterator[Batch]:
        """Batches as a run takes them; `names` are those of the last one."""
        task = self.task or run.suite.tasks[0]
        preprocess = preprocess_of(run.suite.dataset(task, "test"), task)
        waiting: list[tuple[str, Tensor]] = []
        for name, image in self.source:
            waiting.append((name, preprocess(image)))
            if len(waiting) == self.batch_size:
                yield self._batch(waiting, task)
                waiting = []
        if waiting:
            yield self._batch(waiting, task)

    def _batch(self, waiting: list[tuple[str, Tensor]], task: str) -> Batch:
        self.names = [name for name, _ in waiting]
        return {task: {"images": torch.stack([image for _, image in waiting]), "index": torch.arange(len(waiting))}}

    def train_dataloader(self) -> "_Endless":
        """The same, for a trainer."""
        assert self.trainer is not None
        return _Endless(self.batches(cast(Adaptation, self.trainer.lightning_module)))

    def val_dataloader(self) -> list[Any]:
        """Nothing: what comes has no labels."""
        return []


class _Endless:
    """An iterator that says it has a length, so that nobody waits for the batch after the one that has come."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self.batches

    def __len__(self) -> int:
        return ENDLESS


class Writer(L.Callback):
    """Writes a line of JSON for every image: its name, task, class and the probability of that class."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, *_: Any) -> None:
        incoming: Incoming = trainer.datamodule  # type: ignore[attr-defined]
        self.write(cast(Adaptation, pl_module), batch, incoming)

    def write(self, run: Adaptation, batch: Batch, incoming: Incoming) -> None:
        """The lines of a batch, at once."""
        with evaluating(run):
            view = run.view(*next(iter(batch.items())))
            known = batch if incoming.task_known else regrouped(run, batch, {view.task: run.finder(run, view)})
            lines = {}
            for task, part in known.items():
                surest = run.view(task, part).logits.softmax(-1).max(-1)
                for place, share, label in zip(part["index"], surest.values, surest.indices, strict=True):
                    words = {"task": task, "class": run.suite.classes(task)[int(label)]}
                    line = {"name": incoming.names[int(place)], **words, "probability": round(float(share), 4)}
                    lines[int(place)] = json.dumps(line)
        self.file.writelines(f"{lines[place]}\n" for place in sorted(lines))
        self.file.flush()


def predict(
    trainer: L.Trainer,
    run: Adaptation,
    source: Iterable[Item],
    output: str | Path,
    adapt: bool = False,
    batch_size: int = 1,
    task: str | None = None,
) -> None:
    """Append the predictions of a source's images to a file, as they come; with `adapt`, learn from each afterwards."""
    _check(run, adapt, task)
    incoming = Incoming(source, batch_size, task)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a", encoding="utf-8") as file:
        writer = Writer(file)
        if adapt:
            trainer.callbacks.append(writer)  # type: ignore[attr-defined]
            trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 1, ENDLESS
            trainer.limit_val_batches = 0
            trainer.fit(run, datamodule=incoming)
            return
        run.configure_model()
        run.to(trainer.strategy.root_device)
        with trainer.precision_plugin.forward_context() if trainer.precision_plugin else nullcontext():
            for batch in incoming.batches(run):
                writer.write(run, run.transfer_batch_to_device(batch, run.device, 0), incoming)


def _check(run: Adaptation, adapt: bool, task: str | None) -> None:
    if task is not None and task not in run.suite.tasks:
        raise InputError(f"no task is called {task!r}; the suite has {', '.join(run.suite.tasks)}")
    if task is None and run.task_id == "given":
        raise InputError("of which task are the images? Give task, or set model.init_args.task_id to inferred")
    needs = set[str]().union(*(phase.objective.needs for phase in run.phases)) - {"task id", "teacher"}
    if adapt and needs:
        raise InputError(f"images as they come bring no {sorted(needs)[0]}: adapt with an objective such as Entropy")
