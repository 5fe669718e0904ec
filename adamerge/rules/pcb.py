"""Entries compete, within their expert and with the other experts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.deltas import AnyDeltas, dense
from adamerge.errors import InputError
from adamerge.ops import matrix
from adamerge.rules.base import Found, Rule, Stack, each_parameter
from adamerge.rules.magnitudes import kth_magnitudes, survey, widest
from adamerge.task_vectors import TaskVectors


@dataclass(frozen=True)
class Competition:
    """What is found over all parameters, each [K].

    Attributes:
        low: the clip-quantile of |τₖ|.
        high: its (1 − clip)-quantile.
        least: the (1 − keep)-quantile of the balance βₖ, 0 at least.
        most: the largest balance.
    """

    low: Tensor
    high: Tensor
    least: Tensor
    most: Tensor


class Pcb(Rule[Competition]):
    """Parameter competition balancing (PCB-Merging, arXiv:2410.02396), in the form of the authors' code.

    With aₖ = |τₖ|, clipped to its quantiles q and 1 − q over the whole model and moved to [0, 1], an entry has the
    balance βₖ = exp(K aₖ²) · tanh(τₖ Σⱼ τⱼ): what is large within its expert and goes the way of all of them. The top
    ρ of an expert's balances, moved to [0, 1], are its weights wₖ, all others are zero, and
    τ = Σₖ wₖ τₖ / Σₖ wₖ. Usual at scale 1.2.

    An entry that goes against the sum of all has a negative balance and never a weight. Tensors that no expert changed
    are not counted in the quantiles.

    Args:
        keep: ρ, 0 < ρ ≤ 1. The code has 0.1 in one place, and in another 0.05 with clip = 0.01.
        clip: q, 0 ≤ q < 0.5.
    """

    elementwise = True
    passes = 5  # one for each quantile of magnitudes, one for the largest balances, two for those on top

    def __init__(self, keep: float = 0.1, clip: float = 1e-4) -> None:
        if not (0 < keep <= 1 and 0 <= clip < 0.5):
            raise InputError(f"expected 0 < keep <= 1 and 0 <= clip < 0.5 in Pcb, got {keep} and {clip}")
        self.keep, self.clip = keep, clip

    def fit(self, task_vectors: TaskVectors) -> Competition:
        """Quantiles by passes over all tensors; no copy of a whole task vector is made."""
        sizes, sample = survey(task_vectors)
        if not sizes:
            return Competition(*torch.zeros(4, len(task_vectors.tasks)))
        count, dtype = sum(sizes.values()), widest(task_vectors, sizes)

        def each(work: Callable[[AnyDeltas], Found]) -> Iterator[Found]:
            return each_parameter(task_vectors, lambda name, deltas: work(deltas), sizes)

        clipped, tasks = int(self.clip * count), len(task_vectors.tasks)
        low, high = (kth_magnitudes(each, rank, dtype, tasks, sample) for rank in (1 + clipped, count - clipped))

        def balances(work: Callable[[AnyDeltas], Found]) -> Iterator[Found]:
            return each(lambda deltas: work(balance(dense(deltas), low, high).clamp(min=0)))

        rank = min(count, 1 + count - int(self.keep * count + 1e-9))
        least = kth_magnitudes(balances, rank, dtype, tasks)
        most = torch.stack(list(balances(lambda deltas: matrix(dense(deltas)).amax(1).cpu()))).amax(0)
        return Competition(low, high, least, most)

    def combine(self, stack: Stack, statistics: Competition) -> Tensor:
        deltas, found = stack.deltas, statistics
        least, most = _as_wide(found.least, deltas), _as_wide(found.most, deltas)
        balances = balance(deltas, found.low, found.high)
        # Where all balances on top are equal, each of them has the full weight.
        weights = torch.where(most > least, (balances - least) / (most - least), balances / most).clamp(min=0)
        weights = torch.where(most > 0, weights, 0)
        return (weights * deltas).sum(0) / weights.sum(0).clamp(min=1e-12)


def balance(deltas: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """exp(K (aₖ² − 1)) · tanh(τₖ Σⱼ τⱼ), [K, *shape]: β up to a factor that the weights do not depend on."""
    low, high = _as_wide(low, deltas), _as_wide(high, deltas)
    spread = (high - low).clamp(min=torch.finfo(deltas.dtype).tiny)
    size = (deltas.abs().clamp(low, high) - low) / spread
    return torch.exp(len(deltas) * (size.square() - 1)) * torch.tanh(deltas * deltas.sum(0))


def _as_wide(values: Tensor, deltas: Tensor) -> Tensor:
    """[K] as [K, 1, …, 1], to go with [K, *shape]."""
    return values.to(deltas).view(-1, *[1] * (deltas.dim() - 1))
