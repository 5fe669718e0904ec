"""Which entries of a merge matter to which expert, and one model per task made of them."""

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import AnyDeltas, dense
from adamerge.errors import InputError
from adamerge.ops import matrix
from adamerge.packed import Packed, pack
from adamerge.rules.base import PerTensor, parameters
from adamerge.task_vectors import TaskVectors


def tall_mask(delta: Tensor, merged: Tensor, threshold: float | Tensor) -> Tensor:
    """Mₖ = 1[|τₖ| > λ |τ − τₖ|] for the merged task vector τ (TALL masks, arXiv:2405.07813).

    An entry is an expert's own where its delta is large beside what all others add to it. Entries that neither the
    expert nor the merge has changed are nobody's.

    Args:
        delta: τₖ [*shape], or those of all experts [K, *shape].
        merged: τ [*shape], before any scale.
        threshold: λ ≥ 0; the smaller, the more entries.
    """
    return delta.abs() > threshold * (merged - delta).abs()


def unify(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """EMR's shared task vector and the entries at which each expert agrees with its sign.

    s = sgn(Σₖ τₖ) (−1 where the sum is 0), τ_u = s · max |τₖ| over the experts with s τₖ > 0 (0 where there is none).

    Args:
        deltas: [K, *shape].

    Returns:
        τ_u [*shape] and booleans [K, *shape].
    """
    sign = torch.where(deltas.sum(0) > 0, 1.0, -1.0).to(deltas.dtype)
    agree = deltas * sign > 0
    return sign * torch.where(agree, deltas.abs(), 0).amax(0), agree


class TallMask(PerTensor[Tensor]):
    """TALL masks (arXiv:2405.07813): each task's model takes from Στ what serves that task, θ₀ + mₖ ⊙ Στ.

    mₖ = 1[|τₖ| > λ |Στ − τₖ|]. One vector for all tasks and a bit per task and element are kept. One expert alone is
    itself. The outcome is one model per task, `transform(task_vectors, [TallMask()]).expert(task)`, whose images have
    to come with their task.

    Args:
        threshold: λ > 0, the higher the less is kept: one number, or one by task. The paper chooses among 0.2, 0.3, …
            0.6 for each task by labelled validation images; 0.4 for all needs none.
    """

    sums = False
    per_task = True
    votes = True
    elementwise = True
    passes = 0

    def __init__(self, threshold: float | dict[str, float] = 0.4) -> None:
        values = threshold.values() if isinstance(threshold, dict) else [threshold]
        if odd := [value for value in values if not value > 0]:
            raise InputError(f"expected a threshold above 0 in TallMask, got {odd[0]}")
        self.threshold = threshold

    def fit(self, task_vectors: TaskVectors) -> Tensor:
        """λ of every task, [K]."""
        tasks, given = task_vectors.tasks, self.threshold
        if not isinstance(given, dict):
            return torch.full((len(tasks),), given, dtype=torch.float64)
        if sorted(given) != sorted(tasks):
            raise InputError(f"TallMask has thresholds for {sorted(given)}, the experts are {sorted(tasks)}")
        return torch.tensor([given[task] for task in tasks], dtype=torch.float64)

    def tensor(self, name: str, deltas: AnyDeltas, statistics: Tensor) -> AnyDeltas:
        values = dense(deltas)
        merged, least = values.sum(0), statistics.to(values).view(-1, *[1] * (values.dim() - 1))
        kept = pack(tall_mask(values, merged, least))
        return Packed(values.new_ones(len(values)), values.shape, merged, kept)


class Emr(PerTensor[Tensor]):
    """EMR-Merging (arXiv:2405.17461): elect a shared task vector, mask it for every task, and rescale it.

    τ̂ₖ = γₖ mₖ ⊙ τ_u: τ_u has the sign of Στ and the largest magnitude among the experts of that sign (see `unify`), mₖ
    keeps the entries at which task k agrees with it, and γₖ = Σ mean |τₖ| / Σ mean |mₖ ⊙ τ_u|, sums of the means of all
    tensors, restores the size. Nothing is tuned. One expert alone is itself, and so are identical ones. The outcome is
    one model per task, as with `TallMask`.
    """

    sums = False
    per_task = True
    votes = True
    elementwise = True

    def fit(self, task_vectors: TaskVectors) -> Tensor:
        """γ of every task, [K]."""
        own = torch.zeros(len(task_vectors.tasks), dtype=torch.float64)
        kept = own.clone()
        for name, deltas in parameters(task_vectors):
            values, size = dense(deltas), max(meta(task_vectors.base, name).numel(), 1)
            unified, agree = unify(values)
            own += matrix(values.abs()).sum(1, dtype=torch.float64).cpu() / size
            kept += matrix(agree * unified.abs()).sum(1, dtype=torch.float64).cpu() / size
        return torch.where(kept > 0, own / kept, 1.0)  # a task that agrees nowhere keeps nothing to be scaled

    def tensor(self, name: str, deltas: AnyDeltas, statistics: Tensor) -> AnyDeltas:
        values = dense(deltas)
        unified, agree = unify(values)
        return Packed(statistics.to(values), values.shape, unified, pack(agree))
