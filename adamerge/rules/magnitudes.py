"""The k-th magnitude over all tensors of a model, exactly, without a copy of the model or a sort."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import AnyDeltas, dense
from adamerge.differences import PIECE
from adamerge.kinds import kind
from adamerge.rules.base import Found, parameters
from adamerge.task_vectors import TaskVectors
from adamerge.threads import in_order

#: Counters of a pass: over all values, and between bounds that a sample suggests, where few values fall.
_COARSE, _FINE = 2**16, 2**20
#: A sample reads this share of a large tensor, in so many places, and keeps so many magnitudes of a model.
_SHARE, _PLACES, _KEPT = 1 / 256, 16, 2**21
#: Fewer numbers than this are sorted through rather than counted; of more, about so many suggest where to count.
_COUNTED, _SAMPLED = 2**19, 2**14
#: What bounds leave to either side of the rank sought, as a share of all ranks; more for a sample of few values.
_ROOM = 0.005


@dataclass(frozen=True)
class Sample:
    """Magnitudes out of a model, [K, n], and how many of its values each of the n stands for, [n]."""

    magnitudes: Tensor
    weights: Tensor

    def bounds(self, task: int, rank: int) -> tuple[float, float]:
        """Magnitudes between which the one of that rank is likely to be."""
        values, order = self.magnitudes[task].sort()
        counts = self.weights[order].cumsum(0)
        room = (_ROOM + 2 / math.sqrt(len(values))) * float(counts[-1])
        low, high = (int(torch.searchsorted(counts, rank + side)) for side in (-room, room))
        return float(values[low]) if rank > room else 0.0, float(values[high]) if high < len(values) else math.inf


def survey(task_vectors: TaskVectors) -> tuple[dict[str, int], Sample | None]:
    """Each parameter that some expert changed, with its elements, and a sample of all of them.

    A few rows of a tensor are read, and more only where these have not changed.
    """
    likes = {name: meta(task_vectors.base, name) for name in task_vectors.deltas}
    likes = {name: like for name, like in likes.items() if kind(name, like) == "parameter"}
    share = min(_SHARE, _KEPT / max(1, sum(like.numel() for like in likes.values())))
    sizes, magnitudes, weights = {}, [], []
    for name, like in likes.items():
        rows = _places(like.shape) if task_vectors.elementwise else [None]
        some = torch.cat([_flat(dense(task_vectors.piece(name, part)[1])) for part in rows], 1).abs().cpu()
        if bool(some.any()) or any(bool(deltas.any()) for _, deltas in parameters(task_vectors, (name,))):
            sizes[name] = like.numel()
            some = some[:, :: max(1, int(some.shape[1] / (share * like.numel() + 1024)))]
            magnitudes.append(some.clone())
            weights.append(torch.full((some.shape[1],), like.numel() / some.shape[1], dtype=torch.float64))
    return sizes, Sample(torch.cat(magnitudes, 1), torch.cat(weights)) if sizes else None


def widest(task_vectors: TaskVectors, names: Iterable[str]) -> torch.dtype:
    """The dtype that holds the deltas of all these tensors: float32 at least."""
    dtypes = (meta(task_vectors.base, name).dtype for name in names)
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _flat(deltas: Tensor) -> Tensor:
    """[K, n] of [K, *shape], which may have no axis, or no element."""
    return deltas.reshape(len(deltas), deltas.shape[1:].numel())


def _places(shape: torch.Size) -> list[slice | None]:
    """Evenly spread rows of a tensor; all of a small one."""
    if shape.numel() * _SHARE < 1024:
        return [None]
    rows = max(1, int(shape[0] * _SHARE / _PLACES))
    places = min(_PLACES, shape[0] // rows)
    starts = np.linspace(0, shape[0] - rows, places).astype(int).tolist()
    return [slice(start, start + rows) for start in starts]


def kth(magnitudes: Tensor, rank: int) -> Tensor:
    """The `rank`-th smallest of each row's numbers, all ≥ 0, exactly: [...] of [..., n].

    As `torch.kthvalue`, which on a CPU takes several times as long: the few numbers between two bounds that a sample
    suggests are sorted through, and the others counted.
    """
    exact = magnitudes.dtype in (torch.float32, torch.float64)  # which numpy knows
    if magnitudes.device.type != "cpu" or magnitudes.shape[-1] < _COUNTED or not exact:
        return magnitudes.kthvalue(rank).values
    rows = magnitudes.reshape(-1, magnitudes.shape[-1])
    return torch.stack([_kth(row, rank) for row in rows]).view(magnitudes.shape[:-1])


def _kth(numbers: Tensor, rank: int) -> Tensor:
    every = len(numbers) // _SAMPLED | 1  # odd, so as not to keep to some columns of a matrix
    some = numbers[::every]
    weights = torch.full((len(some),), len(numbers) / len(some), dtype=torch.float64)
    low, high = Sample(some[None], weights).bounds(0, rank)

    def look(piece: Tensor) -> tuple[int, npt.NDArray[np.floating]]:
        values = piece.numpy()
        below = values < low
        return int(np.count_nonzero(below)), values[np.flatnonzero(below != (values <= high))]

    seen = list(in_order(look, numbers.split(PIECE)))
    left, near = rank - sum(below for below, _ in seen), np.concatenate([inside for _, inside in seen])
    if not 0 < left <= len(near):
        return numbers.kthvalue(rank).values
    return numbers.new_tensor(np.partition(near, left - 1)[left - 1])


class EachStack(Protocol):
    """Gives what some work makes of deltas [K, *shape], tensor by tensor or piece by piece, each time it is called."""

    def __call__(self, work: Callable[[AnyDeltas], Found], /) -> Iterable[Found]: ...


def kth_magnitudes(each: EachStack, rank: int, dtype: torch.dtype, tasks: int, sample: Sample | None = None) -> Tensor:
    """The `rank`-th smallest magnitude of every task over all tensors, [K], exactly.

    Floats ≥ 0 sort as their bit patterns do. A pass counts patterns in equal bins over a range, which leaves the one
    bin that holds the value sought as the next range, until a bin is one pattern: two passes in float32, four in
    float64. A sample suggests a first range so narrow that in float32 one pass will do; a range that misses the value
    costs a pass, and no more.

    Args:
        each: all deltas; what is to be done with each may be done in several threads.
        rank: from 1 on, at most the number of elements.
        dtype: float32 or float64, of the widest tensor.
        tasks: K.
        sample: of the same deltas.
    """
    counters = [_Counter(rank, dtype, sample.bounds(k, rank) if sample else None) for k in range(tasks)]

    def look(deltas: AnyDeltas) -> list[_Seen | None]:
        return [counter.look(delta) for counter, delta in zip(counters, deltas, strict=True)]

    while not all(counter.found for counter in counters):
        for seen in each(look):
            for counter, part in zip(counters, seen, strict=True):
                counter.add(part)
        for counter in counters:
            counter.narrow()
    return torch.tensor([counter.low for counter in counters], dtype=counters[0].integers).view(dtype)


#: How many values lie below the range, and the bins of those within it.
_Seen: TypeAlias = tuple[int, npt.NDArray[np.signedinteger]]


class _Counter:
    """Looks for the magnitude of some rank: counts bit patterns from `low` on, in bins of 2^shift patterns."""

    def __init__(self, rank: int, dtype: torch.dtype, bounds: tuple[float, float] | None) -> None:
        self.rank, self.dtype, self.integers = rank, dtype, torch.int64 if dtype == torch.float64 else torch.int32
        self.low, self.high = self._codes(torch.tensor([0.0, math.inf], dtype=dtype)).tolist()
        self.limit, self.found = self.high, False
        bins = _COARSE
        if bounds:
            self.low, self.high = self._codes(torch.tensor(bounds, dtype=dtype)).tolist()
            bins = _FINE
        self._start(bins)

    def look(self, delta: Tensor) -> _Seen | None:
        """The values of one tensor; nothing changes yet, so that several threads may look at once."""
        if self.found:
            return None
        codes = self._codes(delta.abs().to(self.dtype).cpu().flatten()).numpy()
        below = codes < self.low
        inside = np.flatnonzero(below != (codes <= min(self.low + (self.bins << self.shift) - 1, self.limit)))
        return int(np.count_nonzero(below)), (codes[inside] - self.low) >> self.shift

    def add(self, seen: _Seen | None) -> None:
        """Count what was seen."""
        if seen is None:
            return
        self.below += seen[0]
        self.waiting.append(seen[1])
        self.held += len(seen[1])
        if self.held > self.bins:
            self._count()

    def narrow(self) -> None:
        """After a pass: go on with the bin, or the side, in which the value lies."""
        if self.found:
            return
        self._count()
        rank, within = self.rank - self.below, np.cumsum(self.counts)
        if rank < 1:
            self.low, self.high = 0, self.low
        elif rank > within[-1]:
            self.low, self.high = self.low + (self.bins << self.shift), self.limit
        else:
            self.low += int(np.searchsorted(within, rank)) << self.shift
            self.high = self.low + (1 << self.shift) - 1
            self.found = self.low == self.high
        self._start(_COARSE)

    def _start(self, most: int) -> None:
        patterns = self.high - self.low + 1
        self.shift = max(0, math.ceil(math.log2(patterns / most)))
        self.bins = -(-patterns >> self.shift)
        self.below = self.held = 0
        self.counts = np.zeros(self.bins, dtype=np.int64)
        self.waiting: list[npt.NDArray[np.signedinteger]] = []

    def _count(self) -> None:
        if self.waiting:
            self.counts += np.bincount(np.concatenate(self.waiting), minlength=self.bins)
        self.waiting, self.held = [], 0

    def _codes(self, magnitudes: Tensor) -> Tensor:
        return magnitudes.view(self.integers)
