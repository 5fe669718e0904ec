"""TIES: trim what hardly moved, then settle by sign (Yadav et al., arXiv:2306.01708)."""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from adamerge.deltas import AnyDeltas, Sparse, dense
from adamerge.errors import InputError
from adamerge.rules.base import PerTensor, Rule, Stack, parameters
from adamerge.task_vectors import TaskVectors

#: Bits of a float that one pass over the values settles.
_DIGIT = 16


class Trim(PerTensor[Tensor | None]):
    """The first step of TIES: of each expert, the `keep` share of entries that moved furthest; the others are zero.

    Entry i of τₖ stays where |τₖᵢ| ≥ the (d − ⌊keep · d⌋)-th smallest of its d magnitudes, counted over all parameter
    tensors together: one threshold per expert. Thresholds are exact, and found by passes over the tensors (two in
    float32, four in float64) that count 16 bits of the values each; no copy of a whole task vector is made.

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
        self.elementwise = scope == "model"

    def fit(self, task_vectors: TaskVectors) -> Tensor | None:
        """The smallest magnitude that each expert keeps, [K]; nothing where it is another in each tensor."""
        if self.scope == "tensor":
            return None
        changed, dtype = set(), torch.float32
        sizes: Counter[str] = Counter()
        for name, deltas in parameters(task_vectors):
            sizes[name] += deltas.shape[1:].numel()
            if bool(deltas.any()):
                changed.add(name)
                dtype = torch.promote_types(dtype, deltas.dtype)
        unchanged = sum(size for name, size in sizes.items() if name not in changed) if self.count_unchanged else 0
        count = sum(sizes[name] for name in changed) + unchanged
        # The unchanged zeros are the smallest of all magnitudes.
        rank = count - int(self.keep * count) - unchanged
        if rank < 1:
            return torch.zeros(len(task_vectors.tasks), dtype=dtype)
        return kth_magnitudes(lambda: (deltas for _, deltas in parameters(task_vectors, changed)), rank, dtype)

    def tensor(self, name: str, deltas: AnyDeltas, statistics: Tensor | None) -> AnyDeltas:
        values = dense(deltas)
        found = self._least(values) if statistics is None else statistics.to(values.device)
        least = found.view(-1, *[1] * (values.dim() - 1))
        trimmed = torch.where(values.abs() >= least, values, 0)
        return Sparse.from_dense(trimmed) if isinstance(deltas, Sparse) else trimmed

    def _least(self, values: Tensor) -> Tensor:
        """The smallest magnitude that each expert keeps of one tensor, [K]."""
        rank = max(1, values[0].numel() - int(self.keep * values[0].numel()))
        return torch.stack([value.abs().flatten().kthvalue(rank).values for value in values])


class Majority:
    """The sign that most entries of a model's summed task vectors have; looked for when first asked for."""

    def __init__(self, task_vectors: TaskVectors) -> None:
        self.task_vectors = task_vectors

    @cached_property
    def sign(self) -> float:
        """+1 or −1."""
        signs = (dense(deltas).sum(0).sign() for _, deltas in parameters(self.task_vectors))
        return -1.0 if sum(float(sign.sum(dtype=torch.float64)) for sign in signs) < 0 else 1.0


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

    def __init__(self, combine: Literal["sum", "mean"] = "sum") -> None:
        if combine not in ("sum", "mean"):
            raise InputError(f"expected combine to be 'sum' or 'mean' in ElectSign, got {combine!r}")
        self.mean = combine == "mean"

    def fit(self, task_vectors: TaskVectors) -> Majority:
        return Majority(task_vectors)

    def tensor(self, name: str, deltas: AnyDeltas, statistics: Majority) -> AnyDeltas:
        values = dense(deltas)
        sign = values.sum(0).sign()
        # Entries that all experts leave alone need no sign: the pass over all tensors is for exact ties alone.
        tied = (sign == 0) & values.any(0)
        if bool(tied.any()):
            sign = torch.where(tied, statistics.sign, sign)
        elected = torch.where(values.sign() == sign, values, 0)
        return Sparse.from_dense(elected) if isinstance(deltas, Sparse) else elected

    def combine(self, stack: Stack, statistics: Majority) -> Tensor:
        """Combine what the election has left."""
        deltas = stack.deltas
        return deltas.sum(0) / deltas.count_nonzero(0).clamp(min=1) if self.mean else deltas.sum(0)


def kth_magnitudes(stacks: Callable[[], Iterable[AnyDeltas]], rank: int, dtype: torch.dtype) -> Tensor:
    """The `rank`-th smallest magnitude of every task over all tensors, [K], exactly.

    Floats ≥ 0 sort as their bit patterns do. A pass counts how many values have each leading 16 bits, which tells
    those of the value sought; the next passes settle the bits below among the values that begin so.

    Args:
        stacks: gives deltas [K, *shape], tensor by tensor, each time it is called.
        rank: from 1 on, at most the number of elements.
        dtype: float32 or float64, of the widest tensor.
    """
    codes, bits = (torch.int64, 64) if dtype == torch.float64 else (torch.int32, 32)
    prefixes: list[int] = []
    ranks: list[int] = []
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts: list[Tensor] = []
        for deltas in stacks():
            for k, delta in enumerate(deltas):
                code = delta.abs().to(dtype).flatten().view(codes)
                if prefixes:
                    code = code[code >> (shift + _DIGIT) == prefixes[k]]
                count = torch.bincount((code >> shift) & (2**_DIGIT - 1), minlength=2**_DIGIT).cpu()
                if k == len(counts):
                    counts.append(count)
                else:
                    counts[k] += count
        prefixes, ranks = prefixes or [0] * len(counts), ranks or [rank] * len(counts)
        for k, count in enumerate(counts):
            below = count.cumsum(0)
            digit = int(torch.searchsorted(below, ranks[k]))
            ranks[k] -= int(below[digit] - count[digit])
            prefixes[k] = prefixes[k] << _DIGIT | digit
    return torch.tensor(prefixes, dtype=codes).view(dtype)
