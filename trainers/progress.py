"""Progress bars."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

#: Seconds between two looks at what a bar shows: each waits for the device, which could go on meanwhile.
_PAUSE = 0.2


class Progress(RichProgressBar):
    """A bar that says what is going on, and ends with training, so that a report comes below it."""

    def __init__(self, label: str = "", leave: bool = True) -> None:
        super().__init__(leave=leave)
        self.label, self._looked = label, 0.0

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.num_training_batches  # of the whole run, from which a resumed one counts on

    def _get_train_description(self, current_epoch: int) -> str:
        return self.label or type(self.trainer.lightning_module).__name__

    def _update_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if time.monotonic() - self._looked >= _PAUSE or trainer.global_step == trainer.max_steps:
            super()._update_metrics(trainer, pl_module)
            self._looked = time.monotonic()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.refresh()
        self._stop_progress()
