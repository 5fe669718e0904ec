"""Pruning by magnitude within a tensor."""

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.deltas import AnyDeltas, Sparse, dense
from adamerge.errors import InputError
from adamerge.rules.base import PerTensor, each_expert
from adamerge.rules.magnitudes import kth
from adamerge.scales import check_pattern
from adamerge.task_vectors import TaskVectors


class Prune(PerTensor[None]):
    """The `keep` share of largest entries of each expert in each tensor (E-WEMoE, arXiv:2410.21804).

    Entry i of a tensor of τₖ stays where |τₖᵢ| > the (1 − keep)-quantile of that tensor's magnitudes. Values that equal
    the quantile go with what is below it, so that a tensor of equal values is lost; scalars always stay.

    Args:
        keep: 0 < keep ≤ 1; 1 keeps everything.
        sparse: store what is left as `Sparse`, in about 2 · keep of the memory; else zeros take the others' place.
        only: a regular expression; tensors whose names do not contain it stay as they are. Default: all are pruned.
    """

    thins = True

    def __init__(self, keep: float = 0.1, sparse: bool = True, only: str | None = None) -> None:
        if not 0 < keep <= 1:
            raise InputError(f"expected 0 < keep <= 1 in Prune, got {keep}")
        check_pattern(only or "", "Prune")
        self.keep, self.sparse, self.only = keep, sparse, only

    def tensor(self, name: str, deltas: AnyDeltas, statistics: None) -> AnyDeltas:
        if self.only is not None and not re.search(self.only, name):
            return deltas
        pruned = torch.stack([self._prune(delta) for delta in deltas]) if self.keep < 1 else dense(deltas)
        return Sparse.from_dense(pruned) if self.sparse else pruned

    def _prune(self, delta: Tensor) -> Tensor:
        if delta.numel() < 2:
            return delta
        magnitude = delta.abs()
        # Above an interpolated quantile lies what lies above the value just below it. The small number
        # outweighs the rounding of 1 − keep.
        rank = 1 + math.floor((1 - self.keep) * (delta.numel() - 1) + 1e-6)
        return torch.where(magnitude > kth(magnitude.flatten(), rank), delta, 0)


class Breadcrumbs(PerTensor[None]):
    """Model Breadcrumbs (arXiv:2312.06795): each tensor of each expert without its largest and its smallest entries.

    Of n entries, the ⌊γ n⌋ largest by magnitude are outliers and dropped; of the others, the ⌊β n⌋ largest stay, and
    one at least. Entries equal to the last one that stays, on either side, stay as well, so that equal entries are
    treated alike and no tensor is lost, however small.

    Args:
        keep: β, 0 < β ≤ 1.
        outliers: γ, 0 ≤ γ < 1.
    """

    thins = True

    def __init__(self, keep: float = 0.1, outliers: float = 0.01) -> None:
        if not (0 < keep <= 1 and 0 <= outliers < 1):
            raise InputError(f"expected 0 < keep <= 1 and 0 <= outliers < 1 in Breadcrumbs, got {keep} and {outliers}")
        self.keep, self.outliers = keep, outliers

    def tensor(self, name: str, deltas: AnyDeltas, statistics: None) -> AnyDeltas:
        return each_expert(deltas, lambda k, delta: breadcrumbs(delta, self.keep, self.outliers))


def breadcrumbs(delta: Tensor, keep: float, outliers: float) -> Tensor:
    """One tensor of one expert without the `outliers` share of largest entries and all but `keep` of the others."""
    magnitude = delta.abs()
    flat, size = magnitude.flatten(), delta.numel()
    # The small number keeps 0.29 · 100 at 29.
    most = max(1, size - int(outliers * size + 1e-9))
    least = max(1, most + 1 - max(1, int(keep * size + 1e-9)))
    upper, lower = kth(flat, most), kth(flat, least)
    return torch.where((magnitude <= upper) & (magnitude >= lower), delta, 0)


class Cabs(PerTensor[tuple[int, ...]]):
    """Conflict-aware and balanced sparsification (CABS, arXiv:2503.01874): no entry is changed by two experts.

    The experts take turns. Each keeps, of every m consecutive entries of the flattened tensor, the n that it changed
    most among those that no expert before it has kept. A block of r < m entries at the end of a tensor has room for
    ⌈n r / m⌉ per expert, as long as there is any.

    Args:
        n: entries that an expert keeps per block.
        m: size of a block.
        order: the tasks in the order of their turns, the first with the freest choice. Default: that of the experts.
    """

    thins = True
    passes = 0

    def __init__(self, n: int = 64, m: int = 256, order: Sequence[str] | None = None) -> None:
        if not 1 <= n <= m:
            raise InputError(f"expected 1 <= n <= m in Cabs, got n={n} and m={m}")
        self.n, self.m, self.order = n, m, None if order is None else tuple(order)

    def fit(self, task_vectors: TaskVectors) -> tuple[int, ...]:
        """The experts' turns, as positions."""
        tasks = task_vectors.tasks
        order = tasks if self.order is None else self.order
        if sorted(order) != sorted(tasks):
            raise InputError(f"order={list(order)} in Cabs: expected each of {list(tasks)} once")
        if self.n * len(tasks) > self.m:
            raise InputError(
                f"Cabs(n={self.n}, m={self.m}) has room for {self.m // self.n} experts, there are {len(tasks)}: "
                f"make n at most {self.m // len(tasks)} or m at least {self.n * len(tasks)}"
            )
        return tuple(tasks.index(task) for task in order)

    def tensor(self, name: str, deltas: AnyDeltas, statistics: tuple[int, ...]) -> AnyDeltas:
        values = dense(deltas)
        kept, free = torch.zeros_like(values), torch.ones_like(values[0], dtype=torch.bool)
        for k in statistics:
            mask = largest_of_every(torch.where(free, values[k].abs(), 0), self.n, self.m)
            kept[k], free = torch.where(mask, values[k], 0), free & ~mask
        return Sparse.from_dense(kept) if isinstance(deltas, Sparse) else kept


def largest_of_every(magnitude: Tensor, n: int, m: int) -> Tensor:
    """A mask of the n largest of every m consecutive entries, and their share of fewer at the end; [*shape].

    Zeros are never among them, equal entries go by position.
    """
    flat = magnitude.flatten()
    whole = flat.numel() // m * m
    mask = torch.zeros_like(flat, dtype=torch.bool)
    for part, size in ((slice(whole), m), (slice(whole, None), flat.numel() - whole)):
        if size:
            order = flat[part].view(-1, size).argsort(dim=-1, descending=True, stable=True)
            mask[part].view(-1, size).scatter_(-1, order[:, : math.ceil(n * size / m)], True)
    return mask.view(magnitude.shape) & (magnitude > 0)
