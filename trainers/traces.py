"""What a run leaves behind at every step, in bounded memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Trace:
    """Step, seconds and losses [T] over a run; whenever there are `limit` rows, neighbours become one, their mean.

    A run of up to `limit` steps is kept as it was; a longer one as means of 2, 4, ... steps, and what it takes in
    memory and in a checkpoint stays bounded.
    """

    def __init__(self, limit: int = 1000) -> None:
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


class Snapshots:
    """Coefficients [groups, K] by step; whenever there are more than `limit`, those at every other place go.

    Args:
        every: steps between two snapshots at first.
        limit: how many are kept at most.
    """

    def __init__(self, every: int, limit: int = 400) -> None:
        self.limit, self.spacing = limit, every
        self.values: dict[int, Tensor] = {}
        #: The experts, from which step on.
        self.experts: dict[int, list[str]] = {}

    def due(self, step: int) -> bool:
        """Whether one is taken after so many steps."""
        return step % self.spacing == 0

    def of_others(self, experts: Sequence[str]) -> bool:
        """Whether there are other experts now than in the last snapshot."""
        return not self.experts or list(experts) != self.experts[max(self.experts)]

    def add(self, step: int, values: Tensor, experts: Sequence[str]) -> None:
        """One more."""
        if self.of_others(experts):
            since = step if self.experts else min(self.values, default=step)  # older checkpoints do not say
            self.experts[since] = list(experts)
        self.values[step] = values.cpu().clone()
        if len(self.values) > self.limit:
            self.spacing *= 2
            self.values = {step: kept for step, kept in self.values.items() if self.due(step)}

    def table(self) -> tuple[list[int], Tensor, tuple[str, ...]]:
        """Steps, values [steps, groups, K] and the names of all K experts there were; NaN where one was not there."""
        steps, known = sorted(self.values), list(self.experts.values())
        names = tuple(dict.fromkeys(name for own in reversed(known) for name in own))
        values = torch.full((len(steps), len(self.values[steps[0]]), len(names)), torch.nan)
        for row, step in zip(values, steps, strict=True):
            own = self.experts[max(since for since in self.experts if since <= step)]
            row[:, [names.index(name) for name in own]] = self.values[step].to(row)
        return steps, values, names

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from."""
        return {"spacing": self.spacing, "snapshots": dict(self.values), "experts": dict(self.experts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.values, self.experts = dict(state["snapshots"]), dict(state.get("experts", {}))
        self.spacing = state.get("spacing", self.spacing)


def _mean(rows: list[tuple[int, float, Tensor]]) -> tuple[int, float, Tensor]:
    """The last step, and the means of the rest, of losses over the steps in which a task came."""
    steps, seconds, losses = zip(*rows, strict=True)
    own = losses[0] if len(rows) == 1 else torch.stack([loss.cpu() for loss in losses]).nanmean(0)
    return steps[-1], sum(seconds) / len(seconds), own
