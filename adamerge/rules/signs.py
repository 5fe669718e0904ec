"""Experts as the signs of their task vectors."""

import torch
from torch import Tensor

from adamerge.deltas import AnyDeltas, dense
from adamerge.errors import InputError
from adamerge.ops import matrix
from adamerge.packed import Packed, pack
from adamerge.rules.base import PerTensor, parameters
from adamerge.rules.ties import Trim
from adamerge.task_vectors import TaskVectors


def signed(values: Tensor, kept: Tensor, scales: Tensor) -> Packed:
    """aₖ · sgn(τₖ) at the entries that are kept, 0 elsewhere, in a bit or two for each.

    Args:
        values: τ, [K, *shape].
        kept: booleans of the same shape.
        scales: a, [K].
    """
    masks = None if bool(kept.all()) else pack(kept)
    return Packed(scales.to(values), values.shape, masks=masks, signs=pack(values > 0))


class OneBit(PerTensor[None]):
    """1-bit compression (1bit-Merging, arXiv:2502.10743): τ̂ₖ = mean |τₖ| · sgn(τₖ), tensor by tensor.

    A bit per element and a number per tensor are kept of each expert; where a tensor has entries that are exactly zero,
    which have no sign, it takes a second bit to keep them so. The outcome is one model per task,
    `transform(task_vectors, [OneBit()]).expert(task)`.
    """

    sums = False
    per_task = True

    def tensor(self, name: str, deltas: AnyDeltas, statistics: None) -> AnyDeltas:
        values = dense(deltas)
        means = matrix(values.abs()).mean(1)
        # An expert that left the tensor alone has scale 0 and needs no mask.
        alone = (means == 0).view(-1, *[1] * (values.dim() - 1))
        return signed(values, (values != 0) | alone, means)


class ComPeft(PerTensor[tuple[Tensor, Tensor]]):
    """ComPEFT (arXiv:2311.13171): the largest entries of each expert, of which only the signs are kept.

    τ̂ₖ = a · std(τₖ) · sgn(τₖ) where |τₖ| is in the `keep` largest share of the whole task vector (see `Trim`), else 0;
    std is over all its entries, before any are dropped. Two bits per element are kept, and a number for each task. The
    outcome is one model per task, as with `OneBit`.

    Args:
        keep: 0 < keep ≤ 1; 0.05 to 0.5 in the paper.
        scale: a; the paper chooses 0.5 to 10 by validation, the more the smaller the model; 1 is usual for large ones.
    """

    sums = False
    per_task = True
    thins = True
    elementwise = True

    def __init__(self, keep: float = 0.2, scale: float = 1.0) -> None:
        if not 0 < keep <= 1:
            raise InputError(f"expected 0 < keep <= 1 in ComPeft, got {keep}")
        if not scale > 0:
            raise InputError(f"expected a scale above 0 in ComPeft, got {scale}")
        self.keep, self.scale = keep, scale

    def fit(self, task_vectors: TaskVectors) -> tuple[Tensor, Tensor]:
        """The smallest magnitude that each expert keeps and the size that it then has, both [K]."""
        least = Trim(self.keep).fit(task_vectors)
        assert least is not None  # one threshold for all tensors
        return least, self.scale * deviations(task_vectors)

    def tensor(self, name: str, deltas: AnyDeltas, statistics: tuple[Tensor, Tensor]) -> AnyDeltas:
        values, (least, sizes) = dense(deltas), statistics
        kept = values.abs() >= least.to(values.device).view(-1, *[1] * (values.dim() - 1))
        return signed(values, kept & (values != 0), sizes)


def deviations(task_vectors: TaskVectors) -> Tensor:
    """Standard deviation of each task vector over all tensors that some expert changed, [K], in float64."""
    sums: dict[str, tuple[int, Tensor]] = {}
    for name, deltas in parameters(task_vectors):  # a large tensor comes in pieces
        flat = matrix(dense(deltas)).double().cpu()
        size, moments = sums.get(name, (0, torch.zeros(2, len(flat), dtype=torch.float64)))
        sums[name] = size + flat.shape[1], moments + torch.stack([flat.sum(1), flat.square().sum(1)])
    changed = [(size, moments) for size, moments in sums.values() if bool(moments[1].any())]
    count = max(sum(size for size, _ in changed), 1)
    nothing = torch.zeros(2, len(task_vectors.tasks), dtype=torch.float64)
    mean, square = sum((moments for _, moments in changed), nothing) / count
    return (square - mean.square()).clamp(min=0).sqrt()
