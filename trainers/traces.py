"""What a run leaves behind at every step, in bounded memory."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Trace:
    """Step, seconds and losses [T] over a run; whenever there are `limit` rows, neighbours become one, their mean.

    A run of up to `limit` steps is kept as it was; a longer one as means of 2, 4, ... steps, and what it takes in
    memory and in a checkpoint stays bounded.
    """

    def __init__(self, limit: int = 2000) -> None:
        self.limit, self.stride = limit, 1
        self.steps: list[int] = []
        self.seconds: list[float] = []
        self.losses: list[Tensor] = []
        self._pending: list[tuple[int, float, Tensor]] = []

    def add(self, step: int, seconds: float, losses: Tensor) -> None:
        """One more step."""
        self._pending.append((step, seconds, losses))
        if len(self._pending) < self.stride:
            return
        self._put(*_mean(self._pending))
        self._pending = []
        if len(self.steps) >= self.limit:
            rows = list(zip(self.steps, self.seconds, self.losses, strict=True))
            self.steps, self.seconds, self.losses, self.stride = [], [], [], 2 * self.stride
            for first in range(0, len(rows), 2):
                self._put(*_mean(rows[first : first + 2]))

    def _put(self, step: int, seconds: float, losses: Tensor) -> None:
        self.steps.append(step)
        self.seconds.append(seconds)
        self.losses.append(losses)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        stacked = torch.stack([loss.cpu() for loss in self.losses]) if self.losses else torch.zeros(0)
        pending = [(step, seconds, losses.cpu()) for step, seconds, losses in self._pending]
        kept = {"steps": list(self.steps), "durations": list(self.seconds), "losses": stacked}
        return {**kept, "stride": self.stride, "pending": pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; from a checkpoint that kept every step, too."""
        self.steps, self.losses = list(state["steps"]), list(state["losses"])
        self.seconds = list(state.get("durations", [])) or [0.0] * len(self.steps)
        self.stride, self._pending = state.get("stride", 1), list(state.get("pending", []))


def _mean(rows: list[tuple[int, float, Tensor]]) -> tuple[int, float, Tensor]:
    """The last step, and the means of the rest, of losses over the steps in which a task came."""
    steps, seconds, losses = zip(*rows, strict=True)
    own = losses[0] if len(rows) == 1 else torch.stack([loss.cpu() for loss in losses]).nanmean(0)
    return steps[-1], sum(seconds) / len(seconds), own
