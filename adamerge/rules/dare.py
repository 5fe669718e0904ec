"""Entries dropped at random, the others enlarged in return."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adamerge.deltas import AnyDeltas
from adamerge.differences import pieces
from adamerge.errors import InputError
from adamerge.rules.base import PerTensor, each_expert
from adamerge.rules.random import generator
from adamerge.scales import check_pattern
from adamerge.task_vectors import TaskVectors
from adamerge.threads import in_order, one_thread


class RandomDrop(PerTensor[tuple[str, ...]]):
    """Entries of each expert, dropped by a mask drawn for (seed, task, tensor name)."""

    draws = True

    seed: int

    def fit(self, task_vectors: TaskVectors) -> tuple[str, ...]:
        """The experts, whose names seed the masks."""
        return task_vectors.tasks

    def draw(self, shape: torch.Size, task: str, name: str) -> Tensor:
        """Uniform numbers in [0, 1), [*shape], in float32 whatever the dtype of the deltas."""
        return torch.rand(shape, generator=generator(self.seed, task, name))


class Dare(RandomDrop):
    """Drop and rescale (DARE, arXiv:2311.03099): τ̂ₖ = mₖ ⊙ τₖ / (1 − p), with every entry of mₖ kept by chance 1 − p.

    The expected delta stays what it was. A magnitude threshold after it is refused: among so few entries it means
    nothing, and with keep > 1 − p it would be 0 and keep everything.

    Args:
        drop: p, 0 ≤ p < 1.
        seed: of the masks.
        rescale: divide by 1 − p.
        only: a regular expression; tensors whose names do not contain it stay as they are. Default: all are masked.
    """

    def __init__(self, drop: float = 0.9, seed: int = 0, rescale: bool = True, only: str | None = None) -> None:
        if not 0 <= drop < 1:
            raise InputError(f"expected 0 <= drop < 1 in Dare, got {drop}")
        check_pattern(only or "", "Dare")
        self.drop, self.seed, self.rescale, self.only = drop, seed, rescale, only

    def tensor(self, name: str, deltas: AnyDeltas, statistics: tuple[str, ...]) -> AnyDeltas:
        if self.only is not None and not re.search(self.only, name):
            return deltas
        rescaled = self.drop if self.rescale else 0.0

        def masked(k: int, delta: Tensor) -> Tensor:
            keep = self.draw(delta.shape, statistics[k], name) >= self.drop
            return dare(delta, keep.to(delta.device), rescaled)

        return each_expert(deltas, masked)


class Della(RandomDrop):
    """DARE with a mind to magnitude (DELLA, arXiv:2406.11617): the larger an entry in its row, the likelier it stays.

    Of n entries of a row, that of rank i = 1 … n by |τₖ| stays with the chance qᵢ = 1 − p − w/2 + w (i − 1)/(n − 1),
    and is then divided by qᵢ. A vector is one row, a tensor of more than two axes is seen as [shape[0], rest], and the
    only entry of a row has the chance 1 − p.

    Args:
        drop: p, the mean chance to be dropped.
        window: w, from the largest to the smallest chance; 0 ≤ p − w/2 and p + w/2 < 1.
        seed: of the masks.
        rescale: divide by qᵢ.
    """

    def __init__(self, drop: float = 0.3, window: float = 0.14, seed: int = 0, rescale: bool = True) -> None:
        if window < 0 or not (drop - window / 2 >= 0 and drop + window / 2 < 1):
            raise InputError(
                f"expected chances to be dropped between 0 and 1 in Della, got {drop} ± {window}/2: make window smaller"
            )
        self.drop, self.window, self.seed, self.rescale = drop, window, seed, rescale

    def tensor(self, name: str, deltas: AnyDeltas, statistics: tuple[str, ...]) -> AnyDeltas:
        def masked(k: int, delta: Tensor) -> Tensor:
            drawn = self.draw(delta.shape, statistics[k], name).to(delta.device)
            return by_rows(lambda rows: self._masked(delta[rows], drawn[rows]), delta.shape)

        return each_expert(deltas, masked)

    def _masked(self, delta: Tensor, drawn: Tensor) -> Tensor:
        """Some rows of a tensor."""
        chances = della_chances(delta, self.drop, self.window)
        return torch.where(drawn < chances, delta / chances.to(delta.dtype) if self.rescale else delta, 0)


def by_rows(work: Callable[[Any], Tensor], shape: torch.Size) -> Tensor:
    """`work` on some rows of a tensor of that shape at a time, in several threads; a vector is one row."""
    if len(shape) < 2:
        return work(...)
    with one_thread():
        return torch.cat(list(in_order(lambda rows: work(rows or ...), pieces(shape))))


def dare(delta: Tensor, keep: Tensor, drop: float) -> Tensor:
    """keep ⊙ delta / (1 − drop) for a boolean mask, all [*shape]; `drop` 0 leaves entries at their size."""
    return torch.where(keep, delta / (1 - drop), 0)


def della_chances(delta: Tensor, drop: float, window: float) -> Tensor:
    """The chance of every entry to stay, by its rank within its row: [*shape], in float64 whatever the deltas are.

    Equal entries rank by position.
    """
    rows = delta.abs().flatten(1) if delta.dim() > 1 else delta.abs().reshape(1, -1)
    least, most = (1 - drop - window / 2, 1 - drop + window / 2) if rows.shape[1] > 1 else (1 - drop, 1 - drop)
    chances = torch.linspace(least, most, rows.shape[1], dtype=torch.float64, device=delta.device).expand_as(rows)
    return torch.empty_like(rows, dtype=torch.float64).scatter_(-1, _order(rows), chances).view(delta.shape)


def _order(rows: Tensor) -> Tensor:
    """As `rows.argsort(stable=True)` of float32 numbers ≥ 0, [m, n]; on a CPU, several times as fast.

    Such numbers sort as their bit patterns do, and with their positions in the lower half no two are equal.
    """
    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows.argsort(dim=-1, stable=True)
    keys = (rows.view(torch.int32).long() << 32) + torch.arange(rows.shape[1])
    keys.numpy().sort(axis=-1)
    return keys & 0xFFFFFFFF
