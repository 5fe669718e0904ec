"""Queries, keys and values that a checkpoint keeps in one tensor, merged as three.

Rules that look at a tensor as a whole (its spectrum, its norm, its ranks) find other things in three matrices than in
one of three times the size. Which tensors are fused says `adamerge.kinds.FAMILIES`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints import Factors, State, factors_of, meta, rows_of
from adamerge.deltas import dense
from adamerge.kinds import role
from adamerge.rules.combining import MergedState
from adamerge.task_vectors import TaskVectors
from adamerge.views import View

_PARTS = ("query", "key", "value")


class Thirds:
    """Which tensors of a state are three in one, and along which axis: that of size 3d in [3d], [3d, d] or [d, 3d]."""

    def __init__(self, base: State) -> None:
        fused = {name: meta(base, name).shape for name in base if role(name) == "qkv"}
        self.axes = {name: shape.index(max(shape)) for name, shape in fused.items() if shape and max(shape) % 3 == 0}
        self.names = {part: (name, n) for name in self.axes for n, part in enumerate(self.parts(name))}

    def parts(self, name: str) -> list[str]:
        """The names of the parts of a fused tensor; any other is its own part."""
        return [f"{name}.{part}" for part in _PARTS] if name in self.axes else [name]

    def split(self, names: Iterable[str]) -> list[str]:
        """All parts of all tensors."""
        return [part for name in names for part in self.parts(name)]


class Split(View):
    """A state in which every fused tensor is three."""

    def __init__(self, state: State, thirds: Thirds) -> None:
        super().__init__(state)
        self.thirds = thirds

    def __contains__(self, name: object) -> bool:
        return name in self.thirds.names or (name in self.state and name not in self.thirds.axes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.thirds.split(self.state))

    def __len__(self) -> int:
        return len(self.state) + 2 * len(self.thirds.axes)

    def meta(self, name: str) -> Tensor:
        if name not in self.thirds.names:
            return meta(self.state, name)
        whole, n = self.thirds.names[name]
        return meta(self.state, whole).chunk(3, self.thirds.axes[whole])[n]

    def factors(self, name: str, rows: slice | None = None) -> Factors | None:
        """As `factors_of(state, name, rows)`."""
        if name not in self.thirds.names:
            return factors_of(self.state, name, rows)
        whole, n = self.thirds.names[name]
        if (found := factors_of(self.state, whole)) is None:
            return None
        left, right = found
        if self.thirds.axes[whole] == 0:
            left = left.chunk(3)[n]
        else:
            right = right.chunk(3, 1)[n]
        return left[rows or slice(None)], right

    def part(self, name: str, rows: slice | None) -> Tensor:
        if name not in self.thirds.names:
            return self.state[name] if rows is None else rows_of(self.state, name, rows)
        whole, n = self.thirds.names[name]
        start, stop, _ = (rows or slice(None)).indices(self.meta(name).shape[0])
        if self.thirds.axes[whole] == 0:
            skip = n * self.meta(name).shape[0]
            return rows_of(self.state, whole, slice(skip + start, skip + stop))
        return rows_of(self.state, whole, slice(start, stop)).chunk(3, self.thirds.axes[whole])[n]


class Joined(Mapping[str, Tensor]):
    """The merge of split task vectors, with its parts joined again: to be read and written as a `MergedState`."""

    def __init__(self, state: MergedState, thirds: Thirds, names: Iterable[str]) -> None:
        self.state, self.thirds, self.names = state, thirds, tuple(names)
        self.original, self.elementwise = state.original, state.elementwise

    def __getitem__(self, name: str) -> Tensor:
        return torch.cat(parts) if len(parts := list(self.parts(name))) > 1 else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The merged tensor as consecutive rows."""
        return (self.part(name, rows) for rows in self.pieces(name))

    def pieces(self, name: str) -> Iterator[Any]:
        """What `part` takes, in the order of the rows."""
        whole = self.thirds.parts(name)
        if self.thirds.axes.get(name) == 0:
            return ((part, rows) for part in whole for rows in self.state.pieces(part))
        return ((None, rows) for rows in self.state.pieces(whole[0]))

    def part(self, name: str, rows: Any) -> Tensor:
        """Some rows of one part, or of all of them side by side."""
        one, place = rows
        parts = [self.state.part(part, place) for part in ([one] if one else self.thirds.parts(name))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def split(task_vectors: TaskVectors) -> tuple[TaskVectors, Thirds]:
    """Task vectors in which every fused tensor is three, and how to join them."""
    thirds = Thirds(task_vectors.base)

    def third(name: str) -> Tensor:
        whole, n = thirds.names.get(name, (name, 0))
        deltas = dense(task_vectors.deltas[whole])
        return deltas.chunk(3, thirds.axes[whole] + 1)[n] if whole in thirds.axes else deltas

    if task_vectors.lazy:
        return task_vectors.viewed(lambda state: Split(state, thirds), thirds.split), thirds
    base = Split(task_vectors.base, thirds)
    deltas = {name: third(name) for name in thirds.split(task_vectors.deltas)}
    fingerprints = task_vectors.fingerprints
    return TaskVectors({n: base[n] for n in base}, deltas, task_vectors.tasks, task_vectors.tied, fingerprints), thirds
