"""Shared entries averaged, unique ones kept: for experts that change few entries each."""

import torch
from torch import Tensor

from adamerge.deltas import dense
from adamerge.errors import InputError
from adamerge.rules.base import Rule, Stack, parameters
from adamerge.task_vectors import TaskVectors


class Ram(Rule[Tensor]):
    """Reinforced Agent Merging (RAM, arXiv:2601.13572), for sparse task vectors as reinforcement learning leaves them.

    An expert is active where |τₖ| > threshold. An entry with one active expert takes λₖ τₖ, one with several takes the
    mean over these, and one without stays the base's. λₖ = 1 + r · min(ρₖ, α), with ρₖ the number of entries that
    expert k shares, over the number of those where it is alone, in the whole model: what its unique entries get in
    return for what is averaged away. r = 0 is RAM, r = 0.1 is RAM+.

    Args:
        rescale: r ≥ 0.
        cap: α ≥ 0.
        threshold: ≥ 0.
    """

    elementwise = True

    def __init__(self, rescale: float = 0.0, cap: float = 0.2, threshold: float = 1e-5) -> None:
        if min(rescale, cap, threshold) < 0:
            raise InputError(f"expected no negative argument in Ram, got {rescale}, {cap} and {threshold}")
        self.rescale, self.cap, self.threshold = rescale, cap, threshold

    def fit(self, task_vectors: TaskVectors) -> Tensor:
        """λ, [K]."""
        shared, unique = torch.zeros(2, len(task_vectors.tasks), dtype=torch.int64)
        if self.rescale:
            for _, deltas in parameters(task_vectors):
                active = (dense(deltas).abs() > self.threshold).reshape(len(deltas), -1)
                alone = active.sum(0) == 1
                unique += (active & alone).sum(1).cpu()
                shared += (active & ~alone).sum(1).cpu()
        return 1 + self.rescale * (shared.double() / unique.clamp(min=1)).clamp(max=self.cap)

    def combine(self, stack: Stack, statistics: Tensor) -> Tensor:
        active = stack.deltas.abs() > self.threshold
        count = active.sum(0)
        factors = statistics.to(stack.deltas).view(-1, *[1] * count.dim())
        values = torch.where(active, stack.deltas, 0)
        return torch.where(count > 1, values.sum(0) / count.clamp(min=1), (factors * values).sum(0))
