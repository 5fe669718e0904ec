"""Callbacks for streams without end: experts that come and go, ways back to the start, averages of what is learned."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from adamerge import InputError
from adamerge.objectives import entropy
from trainers.adaptation import Adaptation
from trainers.pools import exchange, restrict

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


class Experts(L.Callback):
    """Merges other experts of the suite from some steps on, while the run goes on.

    An expert that comes starts as in a new run: its coefficients at their prior, its part of a router at random, the
    optimiser's moments at zero (Adam's first steps for it are then longer than usual ones, by up to
    (1 − β₁) / √(1 − β₂) = 3.2, as its count of steps is that of the others). The others keep their numbers and moments,
    and an expert that goes takes its own along; task vectors are transformed anew, and coefficients that are bound to
    sum to one share it out anew. Tasks and heads are the suite's throughout.

    A run may also be resumed with this callback where it had none, and with a suite to which experts were added, or
    from which they were taken: it then goes on with those that the schedule has for its step.

    Args:
        schedule: from each of these steps on, the experts that are merged, by name; `None`: all of the suite. Before
            the first step that is named, and by default, they are all of the suite.
    """

    def __init__(self, schedule: dict[int, list[str] | None] | None = None) -> None:
        self.schedule = dict(sorted((schedule or {}).items()))
        for step, names in self.schedule.items():
            if step < 0:
                raise InputError(f"the schedule of experts begins at step 0, not {step}")
            if names is not None and not names:
                raise InputError(f"at step {step} no expert would be left: name one or more, or null for all")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look at every part of the schedule before work starts."""
        if not isinstance(pl_module, Adaptation) or stage != "fit":
            return
        pool = pl_module.whole.experts
        for phase in pl_module.phases:
            if not phase.stepper.descends and phase.stepper.learns:
                raise InputError(f"{type(phase.stepper).__name__} searches for one pool: its experts cannot change")
        for step, names in self.schedule.items():
            if odd := [name for name in names or () if name not in pool]:
                raise InputError(
                    f"from step {step} on, expert {odd[0]!r} is to be merged; the suite has {', '.join(pool)}"
                )
        now = pl_module.suite.experts if pl_module.model is not None else self._at(pl_module, 0)
        for step in self.schedule:
            restrict(pl_module, self._at(pl_module, step))
        restrict(pl_module, now)
        pl_module.schedule = lambda step: self._at(pl_module, step)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation):
            later = [step for step in self.schedule if trainer.global_step < step < trainer.max_steps]
            if later and trainer.world_size > 1:
                raise InputError(
                    "several processes change their experts only where they resume: end the run with "
                    f"trainer.max_steps={later[0]}, and go on from there with --ckpt_path last"
                )
            self._exchange(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if isinstance(pl_module, Adaptation) and trainer.global_step < trainer.max_steps:
            self._exchange(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if isinstance(pl_module, Adaptation):
            pl_module.schedule = None

    def _exchange(self, trainer: L.Trainer, module: Adaptation) -> None:
        wanted = self._at(module, trainer.global_step)
        if wanted != module.merged.tasks:
            exchange(trainer, module, wanted)
            log.info("From step %d on, the run merges %s", trainer.global_step, ", ".join(wanted))

    def _at(self, module: Adaptation, step: int) -> tuple[str, ...]:
        """The experts after so many steps, in the suite's order."""
        names = next((names for since, names in reversed(self.schedule.items()) if since <= step), None)
        return tuple(name for name in module.whole.experts if names is None or name in names)


def _learned(module: Adaptation) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
