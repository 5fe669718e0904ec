"""Steps whose gradient is no number: skipped and counted, until there are too many of them."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamerge import InputError

log = logging.getLogger(__name__)


class Finite:
    """Lets no step through whose gradient is not finite: what learns, and the optimiser's moments, stay as they are.

    A loss that is not finite has no finite gradient. After too many such steps in a row the run stops, with what it had
    learned before the first. An optimiser that skips by itself (see `fuse`) is told on its device, so that nobody waits
    for the norm; such a step is counted, and told of, when the next one comes.

    Args:
        in_a_row: how many steps in a row may be skipped; 0 stops at the first.
    """

    def __init__(self, in_a_row: int) -> None:
        if in_a_row < 0:
            raise InputError(f"skip_steps is how many steps in a row may be skipped: 0 or more, not {in_a_row}")
        self.in_a_row = in_a_row
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.skipped = self.row = 0
        self._later: tuple[_Coming, int] | None = None

    def passes(self, norm: Tensor, step: int, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimiser may take a step whose gradient has this norm, or will skip it by itself.

        Raises InputError after too many that may not be taken.
        """
        self.settle()
        if not _skips(optimizer):
            return self._count(float(norm), step)
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self._later = _Coming(norm), step
        return True

    def settle(self) -> None:
        """Count the last step, if nobody knew yet whether it was skipped. Raises InputError after too many."""
        if self._later is not None:
            (norm, step), self._later = self._later, None
            self._count(norm.value(), step)

    def _count(self, value: float, step: int) -> bool:
        if math.isfinite(value):
            self.row = 0
            return True
        self.skipped, self.row = self.skipped + 1, self.row + 1
        if self.row > self.in_a_row:
            raise InputError(
                f"the gradient is {value} at step {step} ({self.row} such steps in a row, {self.skipped} in all): "
                "lower the learning rate, or look at these steps' images; what was learned before is in last.ckpt"
            )
        if self.row == 1:
            log.warning("step %d is skipped: its gradient is %s", step, value)
        return False

    def leave_out(self, step: int) -> None:
        """Count a step whose batch has no image."""
        self.skipped += 1
        log.warning("step %d is skipped: none of its images can be read (%d steps so far)", step, self.skipped)

    def state_dict(self) -> dict[str, int]:
        """What the next step depends on."""
        self.settle()
        return {"skipped": self.skipped, "row": self.row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.reset()
        self.skipped, self.row = int(state.get("skipped", 0)), int(state.get("row", 0))


class _Coming:
    """A number that a device may still have to compute: asking for it waits for that, and for nothing after it."""

    def __init__(self, number: Tensor) -> None:
        self._number, self._computed = number.to("cpu", non_blocking=True), None
        if number.is_cuda:
            self._computed = torch.cuda.Event()
            self._computed.record()

    def value(self) -> float:
        if self._computed is not None:
            self._computed.synchronize()
        return float(self._number)


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam, on a GPU and unless it was told how, take a step in one launch, which can skip itself on the device."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.Adam) else ():
        free = group["fused"] is None and not (group["foreach"] or group["capturable"] or group["differentiable"])
        if free and all(p.is_cuda and p.is_floating_point() for p in group["params"]):
            group["fused"] = True


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser leaves everything as it is where its `found_inf` is 1, as torch's fused Adam does."""
    return isinstance(optimizer, torch.optim.Adam) and all(group["fused"] for group in optimizer.param_groups)


def check_finite(learned: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raise InputError, before it is stored, for a number that was learned and is none."""
    for name, parameter in learned:
        if not bool(parameter.isfinite().all()):
            raise InputError(
                f"{name} is not finite after step {step}: lower the learning rate; what was learned before is in the "
                "checkpoint of an earlier step, and this one is not written"
            )
