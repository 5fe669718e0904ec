"""Callbacks for streams without end: going back to the start, at times or on drift, and averages of what is learned."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from adamerge import InputError
from adamerge.objectives import entropy
from trainers.adaptation import Adaptation

log = logging.getLogger(__name__)


class Reset(L.Callback):
    """Goes back to the start every so many steps: what was learned and the optimiser begin anew (an episode).

    Args:
        every: steps of an episode; default: never by their number.
        drift: go back, too, when the entropy of the predictions has risen, by the test of Page and Hinkley (Page,
            "Continuous inspection schemes", 1954): with x_t the mean entropy of a step, relative to log C, and x̄_t the
            mean since the last reset, m_t = Σ_{s≤t} (x_s − x̄_s − δ) must not exceed its least value so far by more
            than `drift`.
        tolerance: δ, a rise that is no drift.
    """

    def __init__(self, every: int | None = None, drift: float | None = None, tolerance: float = 0.01) -> None:
        if every is None and drift is None:
            raise InputError("Reset goes back every so many steps, or on drift: give every or drift")
        if (every is not None and every < 1) or (drift is not None and drift <= 0):
            raise InputError(f"every and drift must be positive, got {every} and {drift}")
        self.every, self.drift, self.tolerance = every, drift, tolerance
        self.start: dict[str, Tensor] = {}
        self.resets: list[int] = []
        self._count, self._mean, self._sum, self._least = 0, 0.0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation) and (trainer.global_step == 0 or not self.start):
            self.start, self.resets = _learned(pl_module), []
            self._forget()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if not isinstance(pl_module, Adaptation):
            return
        step, last = trainer.global_step, self.resets[-1] if self.resets else 0
        if self._drifts(outputs["logits"]):
            log.info("The predictions have become less sure: the run goes back to its start at step %d", step)
        elif self.every is None or step == last or step - last < self.every:
            return
        self.resets.append(step)
        self._forget()
        pl_module.load_state_dict(self.start)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()

    def _drifts(self, logits: Mapping[str, Tensor]) -> bool:
        if self.drift is None or not logits:
            return False
        each = [
            entropy(own) / torch.tensor(float(max(own.shape[-1], 2))).log().to(own.device) for own in logits.values()
        ]
        x = float(torch.cat(each).mean())
        self._count += 1
        self._mean += (x - self._mean) / self._count
        self._sum += x - self._mean - self.tolerance
        self._least = min(self._least, self._sum)
        return self._sum - self._least > self.drift

    def _forget(self) -> None:
        self._count, self._mean, self._sum, self._least = 0, 0.0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        seen = (self._count, self._mean, self._sum, self._least)
        return {"start": dict(self.start), "resets": list(self.resets), "seen": seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start, self.resets = dict(state_dict["start"]), list(state_dict["resets"])
        self._count, self._mean, self._sum, self._least = state_dict["seen"]


class MovingAverage(L.Callback):
    """Validates, and ends, with the average of what was learned: a ← d a + (1 − d) w after every step, a = w at first.

    Args:
        decay: d.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay is in [0, 1), got {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation):
            self._step = trainer.global_step
            if trainer.global_step == 0 or not self.average:
                self.average, self._now = _learned(pl_module), {}
            elif self._now:  # resumed after its end, to be made longer
                pl_module.load_state_dict(self._now)
                self._now = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if isinstance(pl_module, Adaptation) and trainer.global_step != self._step:  # not amid a window of batches
            self._step = trainer.global_step
            for name, value in _learned(pl_module).items():
                self.average[name].mul_(self.decay).add_(value, alpha=1 - self.decay)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation) and trainer.state.fn == "fit" and self.average:
            self._now = _learned(pl_module)
            pl_module.load_state_dict(self.average)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation) and self._now:
            pl_module.load_state_dict(self._now)
            self._now = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation) and self.average:
            self._now = _learned(pl_module)
            pl_module.load_state_dict(self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"average": dict(self.average), "now": dict(self._now)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average, self._now = dict(state_dict["average"]), dict(state_dict["now"])


def _learned(module: Adaptation) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
