"""Memory that a run on a CPU keeps for its next step."""

from contextlib import ExitStack

import lightning as L

from adamerge.memory import kept


class KeptMemory(L.Callback):
    """Keeps what a run on a CPU frees, until it ends, however it ends; see `adamerge.memory.kept`."""

    def __init__(self) -> None:
        self._held = ExitStack()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cpu":
            self._held.enter_context(kept())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._held.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._held.close()
