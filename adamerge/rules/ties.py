"""TIES: trim what hardly moved, then settle by sign (Yadav et al., arXiv:2306.01708)."""

from collections.abc import Callable, Iterator
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import AnyDeltas, Sparse, dense
from adamerge.errors import InputError
from adamerge.kinds import kind
from adamerge.rules.base import Found, PerTensor, Rule, Stack, each_parameter
from adamerge.rules.magnitudes import kth, kth_magnitudes, survey, widest
from adamerge.task_vectors import TaskVectors

__all__ = ["ElectSign", "Majority", "Trim", "kth_magnitudes"]


class Trim(PerTensor[Tensor | None]):
    """The first step of TIES: of each expert, the `keep` share of entries that moved furthest; the others are zero.

    Entry i of τₖ stays where |τₖᵢ| ≥ the (d − ⌊keep · d⌋)-th smallest of its d magnitudes, counted over all parameter
    tensors together: one threshold per expert. Thresholds are exact, and found by a pass over the tensors (three in
    float64) that counts bit patterns; no copy of a whole task vector is made.

    Args:
        keep: 0 < keep ≤ 1; 1 keeps everything.
        count_unchanged: count tensors that no expert changed in d, as the authors' code does. Their zeros leave room
            for more entries elsewhere: 26 % instead of 20 % of the vision part of an OpenCLIP model that carries its
            text embeddings along. Figures published for such models were obtained so.
        scope: what is counted together: the whole "model", or each "tensor" by itself, as merging tools do that read
            every tensor once.
    """

    thins = True

    def __init__(
        self, keep: float = 0.2, count_unchanged: bool = False, scope: Literal["model", "tensor"] = "model"
    ) -> None:
        if not 0 < keep <= 1:
            raise InputError(f"expected 0 < keep <= 1 in Trim, got {keep}")
        if scope not in ("model", "tensor"):
            raise InputError(f"expected scope to be 'model' or 'tensor' in Trim, got {scope!r}")
        if scope == "tensor" and count_unchanged:
            raise InputError("Trim counts unchanged tensors in a model: with scope='tensor', leave count_unchanged out")
        self.keep, self.count_unchanged, self.scope = keep, count_unchanged, scope
        self.elementwise, self.passes = scope == "model", int(scope == "model")

    def fit(self, task_vectors: TaskVectors) -> Tensor | None:
        """The smallest magnitude that each expert keeps, [K]; nothing where it is another in each tensor."""
        if self.scope == "tensor":
            return None
        sizes, sample = survey(task_vectors)
        changed, likes = sum(sizes.values()), {name: meta(task_vectors.base, name) for name in task_vectors.deltas}
        unchanged = 0
        if self.count_unchanged:
            every = (like.numel() for name, like in likes.items() if kind(name, like) == "parameter")
            unchanged = sum(every) - changed
        # The unchanged zeros are the smallest of all magnitudes.
        rank = changed - int(self.keep * (changed + unchanged))
        dtype = widest(task_vectors, sizes)
        if rank < 1:
            return torch.zeros(len(task_vectors.tasks), dtype=dtype)

        def each(work: Callable[[AnyDeltas], Found]) -> Iterator[Found]:
            return each_parameter(task_vectors, lambda name, deltas: work(deltas), sizes)

        return kth_magnitudes(each, rank, dtype, len(task_vectors.tasks), sample)

    def tensor(self, name: str, deltas: AnyDeltas, statistics: Tensor | None) -> AnyDeltas:
        values = dense(deltas)
        # |x| ≥ least where |x| > the number before it, which one fast call decides.
        found = self._least(values) if statistics is None else statistics
        least = found.to(values.dtype)
        below = torch.where(least >= found, torch.nextafter(least, torch.zeros_like(least)), least).tolist()
        trimmed = torch.empty_like(values)
        for value, bound, out in zip(values, below, trimmed, strict=True):
            torch.hardshrink(value, bound, out=out)
        return Sparse.from_dense(trimmed) if isinstance(deltas, Sparse) else trimmed

    def _least(self, values: Tensor) -> Tensor:
        """The smallest magnitude that each expert keeps of one tensor, [K]."""
        rank = max(1, values[0].numel() - int(self.keep * values[0].numel()))
        return torch.stack([kth(value.abs().flatten(), rank) for value in values])


class Majority:
    """The sign that most entries of a model's summed task vectors have; looked for when first asked for.

    Attributes:
        known: that sign, once it has been asked for.
    """

    def __init__(self, task_vectors: TaskVectors) -> None:
        self.task_vectors = task_vectors
        self.known: float | None = None
        self._lock = Lock()

    @property
    def sign(self) -> float:
        """+1 or −1."""
        with self._lock:  # pieces may be elected in several threads, and one pass is enough
            if self.known is None:
                # Thresholds come before as a rule, and the merge comes after: both go forwards.
                signs = each_parameter(self.task_vectors, lambda _, deltas: _balance(dense(deltas)), backwards=True)
                self.known = -1.0 if sum(signs) < 0 else 1.0
        return self.known


def _balance(deltas: Tensor) -> int:
    """By how many entries positive sums outnumber negative ones, of [K, *shape]."""
    signs = deltas.sum(0).sign_().flatten()
    return sum(int(part.sum()) for part in signs.split(2**24))  # float32 counts no further


class ElectSign(PerTensor[Majority], Rule[Majority]):
    """The second step of TIES: every entry elects a sign, and the experts that disagree lose theirs.

    s = sgn(Σₖ τₖ) entry by entry; where the sum is zero, s is the sign of the sum of all signs in the model (+1 if that
    is zero too). τ̂ₖ = τₖ where sgn(τₖ) = s, else 0. As a transform, the K parts stay apart, each to take a coefficient
    of its own: the TIES split of AdaMerging++ (arXiv:2310.02575). As the last rule of a merge, it combines them.

    Args:
        combine: "sum" for Σₖ τ̂ₖ; "mean" for the mean over the experts that kept the entry (disjoint mean).
    """

    votes = True
    elementwise = True
    passes = 1  # where sums cancel exactly, as some always do in half precision; else none

    def __init__(self, combine: Literal["sum", "mean"] = "sum") -> None:
        if combine not in ("sum", "mean"):
            raise InputError(f"expected combine to be 'sum' or 'mean' in ElectSign, got {combine!r}")
        self.mean = combine == "mean"

    def fit(self, task_vectors: TaskVectors) -> Majority:
        return Majority(task_vectors)

    def tensor(self, name: str, deltas: AnyDeltas, statistics: Majority) -> AnyDeltas:
        agreed, sign = _elect(dense(deltas), statistics)
        elected = agreed.mul_(sign)
        return Sparse.from_dense(elected) if isinstance(deltas, Sparse) else elected

    def combine(self, stack: Stack, statistics: Majority) -> Tensor:
        """Elect, and combine what is left."""
        agreed, sign = _elect(stack.deltas, statistics)
        total = agreed.sum(0).mul_(sign)
        return total.div_(agreed.sign_().sum(0).clamp_(min=1)) if self.mean else total


def _elect(deltas: Tensor, majority: Majority) -> tuple[Tensor, Tensor]:
    """The magnitudes of what agrees with the elected signs, 0 elsewhere, [K, *shape]; these signs, ±1, [*shape]."""
    sign = deltas.sum(0).sign_()
    undecided = 1 - sign.abs()
    # Entries that all experts leave alone may have either sign: the pass over all tensors is for exact ties alone.
    if majority.known is None and bool((deltas.amax(0) * undecided).sum() > 0):
        sign.add_(undecided, alpha=majority.sign)
    else:
        sign.add_(undecided, alpha=majority.known or 1.0)
    return (deltas * sign).relu_(), sign
