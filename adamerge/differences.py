"""Differences of the experts to their base that are computed when they are asked for, whole or piece by piece."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from adamerge.adapters import stacked
from adamerge.checkpoints import Factors, State, factors_of, meta, rows_of
from adamerge.deltas import AnyDeltas, dense
from adamerge.misfits import finite, finite_sum, name_in

#: Elements per expert that elementwise rules take at a time: a few experts' fit into a cache, and each is worth a read.
PIECE = 2**18


class Differences(Mapping[str, AnyDeltas]):
    """Deltas computed when asked for, from states that may be lazy."""

    def __init__(
        self, base: State, experts: Mapping[str, State], tied: Mapping[str, str], names: Iterable[str] | None = None
    ) -> None:
        self.base, self.experts, self.tied = base, experts, tied
        floats = (n for n in base if n not in tied and meta(base, n).is_floating_point())
        self.names = list(floats if names is None else names)
        self._known = frozenset(self.names)

    def only(self, names: Collection[str]) -> "Differences":
        """The same for fewer tensors."""
        return Differences(self.base, self.experts, self.tied, (name for name in self.names if name in names))

    def read(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """Base and experts of one tensor, checked to be finite."""
        experts = [finite(f"expert {task!r}", name, self._expert(task, name)) for task in self.experts]
        return finite("the base", name, self._base(name)), experts

    def rows(self, name: str, rows: slice) -> tuple[Tensor, Tensor]:
        """Base and deltas of some rows of one tensor."""
        base = rows_of(self.base, name, rows).detach()
        return base, dense(self.stack(name, base, None, rows))

    def stack(
        self, name: str, base: Tensor, experts: Iterator[Tensor] | None = None, rows: slice | None = None
    ) -> AnyDeltas:
        """[K, *shape] differences, in float32 or better; each expert is let go before the next is read.

        Where all experts are adapters their factors are the differences; where some are, these are exact nonetheless.
        `experts` are those that are read already.
        """
        factors = [self._factors(task, name, rows) for task in self.experts]
        known = [pair for pair in factors if pair is not None]
        if len(known) == len(factors):
            finite("the base", name, base)
            return stacked(known, base.shape)
        dtype = torch.promote_types(torch.float32, base.dtype)
        start, out = base.to(dtype), base.new_empty((len(self.experts), *base.shape), dtype=dtype)
        whole = True
        for k, (task, pair) in enumerate(zip(self.experts, factors, strict=True)):
            if pair is not None:
                out[k] = (pair[0] @ pair[1]).view(base.shape)
            else:
                out[k].copy_(next(experts) if experts else self._expert(task, name, rows)).sub_(start)
            whole = whole and finite_sum(out[k])
        if not whole:  # then each is looked at by itself, to name it
            finite("the base", name, base)
            for task, pair in zip(self.experts, factors, strict=True):
                if pair is None:
                    finite(f"expert {task!r}", name, self._expert(task, name, rows))
        return out

    def _base(self, name: str) -> Tensor:
        return self.base[name].detach()

    def _expert(self, task: str, name: str, rows: slice | None = None) -> Tensor:
        state = self.experts[task]
        own = name_in(state, name, self.tied)
        return (state[own] if rows is None else rows_of(state, own, rows)).detach()

    def _factors(self, task: str, name: str, rows: slice | None) -> Factors | None:
        state = self.experts[task]
        if (found := factors_of(state, name_in(state, name, self.tied), rows)) is None:
            return None
        left, right = (finite(f"expert {task!r}", name, factor) for factor in found)
        return left, right

    def __getitem__(self, name: str) -> AnyDeltas:
        if name not in self._known:
            raise KeyError(name)
        return self.stack(name, self._base(name))

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Changed(Mapping[str, AnyDeltas]):
    """Deltas changed when asked for."""

    def __init__(
        self, source: "Differences | Changed", change: Callable[[str, AnyDeltas], AnyDeltas], elementwise: bool
    ) -> None:
        self.source, self.change, self.elementwise = source, change, elementwise

    def only(self, names: Collection[str]) -> "Changed":
        """The same for fewer tensors."""
        return Changed(self.source.only(names), self.change, self.elementwise)

    @property
    def base(self) -> State:
        """The base that the files' deltas were taken from."""
        return self.source.base

    def rows(self, name: str, rows: slice) -> tuple[Tensor, AnyDeltas]:
        """That base and the changed deltas, for some rows of one tensor, if the change is elementwise."""
        base, deltas = self.source.rows(name, rows)
        return base, self.change(name, deltas)

    def __getitem__(self, name: str) -> AnyDeltas:
        return self.change(name, self.source[name])

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)


def pieces(shape: torch.Size) -> Iterator[slice | None]:
    """Consecutive rows of a tensor, some `PIECE` elements at a time; `None` for one that is no larger than that."""
    if not shape or shape.numel() <= PIECE:
        yield None
        return
    rows = max(1, PIECE * shape[0] // shape.numel())
    yield from (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
