"""Validation and test of anything that gives logits by task."""

from collections.abc import Mapping, Sequence
from typing import cast

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from modules import Heads


class ScoredModule(L.LightningModule):
    """Logs the top-1 accuracy of every task, and their average, in `validate` and `test`.

    Subclasses call `score` with the classes of the tasks, in the order of the data module's loaders, and give logits in
    `forward(images, task)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = Heads()
        self.accuracy = nn.ModuleDict()

    def score(self, classes: Mapping[str, Sequence[str]], others: bool = False) -> None:
        """Set up one metric per task; with `others`, for one more class than the task has (see `scored`)."""
        for task, names in classes.items():
            self.accuracy[task] = MulticlassAccuracy(len(names) + others, average="micro")

    def scored(self, images: Tensor, task: str) -> Tensor:
        """The logits that are scored, [B, C]; or [B, C + 1], where the last class stands for all other tasks."""
        logits: Tensor = self(images, task)
        return logits

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        images, labels = batch
        if len(images):  # the last chunk of a task may leave a process without images
            task, metric = list(self.accuracy.items())[dataloader_idx]
            cast(MulticlassAccuracy, metric).update(self.scored(images, task), labels)

    def on_validation_epoch_end(self) -> None:
        scores = {}
        for task, metric in self.accuracy.items():
            scores[f"accuracy/{task}"] = cast(MulticlassAccuracy, metric).compute()
            cast(MulticlassAccuracy, metric).reset()
        self.log_dict({**scores, "accuracy": torch.stack(list(scores.values())).mean()})

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end
