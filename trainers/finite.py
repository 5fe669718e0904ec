"""Steps whose gradient is no number: skipped and counted, until there are too many of them."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from adamerge import InputError

log = logging.getLogger(__name__)


class Finite:
    """Lets no step through whose gradient is not finite: what learns, and the optimiser's moments, stay as they are.

    A loss that is not finite has no finite gradient. After too many such steps in a row the run stops, with what it had
    learned before the first.

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

    def passes(self, norm: Tensor, step: int) -> bool:
        """Whether a step may be taken whose gradient has this norm. Raises InputError after too many that may not."""
        if math.isfinite(value := float(norm)):
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
        return {"skipped": self.skipped, "row": self.row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.skipped, self.row = int(state.get("skipped", 0)), int(state.get("row", 0))


def check_finite(learned: Iterable[tuple[str, nn.Parameter]], step: int) -> None:
    """Raise InputError, before it is stored, for a number that was learned and is none."""
    for name, parameter in learned:
        if not bool(parameter.isfinite().all()):
            raise InputError(
                f"{name} is not finite after step {step}: lower the learning rate; what was learned before is in the "
                "checkpoint of an earlier step, and this one is not written"
            )
