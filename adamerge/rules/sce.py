"""Select, calculate, erase: where the experts differ, weighed by how far they moved, without those outvoted."""

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.rules.base import Rule, Stack, entrywise
from adamerge.rules.magnitudes import kth


class Sce(Rule[None]):
    """SCE (FuseChat, arXiv:2408.07990), tensor by tensor.

    Select: the `keep` share of entries whose variance over the experts is largest, counted among those that vary at
    all; the others are zero, unless nothing varies. Calculate: wₖ = mean(τₖ²) / Σⱼ mean(τⱼ²) over what was selected.
    Erase: mₖ = 1 where τₖ has the sign of Σⱼ τⱼ (+ for 0). The outcome is Σ wₖ mₖ τₖ / Σ wₖ mₖ.

    Args:
        keep: 0 < keep ≤ 1; 1 selects everything.
    """

    def __init__(self, keep: float = 0.1) -> None:
        if not 0 < keep <= 1:
            raise InputError(f"expected 0 < keep <= 1 in Sce, got {keep}")
        self.keep = keep

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        deltas = select(stack.deltas, self.keep)
        energy = deltas.square().reshape(len(deltas), -1).mean(1)
        weights = (energy / energy.sum().clamp(min=torch.finfo(energy.dtype).tiny)).view(-1, 1)

        def elected(part: Tensor) -> Tensor:
            sign = torch.where(part.sum(0) >= 0, 1, -1)
            votes = weights * (part.sign() == sign)
            return (votes * part).sum(0) / votes.sum(0).clamp(min=torch.finfo(votes.dtype).tiny)

        return entrywise(elected, deltas)


def select(deltas: Tensor, keep: float) -> Tensor:
    """[K, *shape] with zeros where the variance over K is not among the `keep` share of largest ones."""
    if keep == 1:
        return deltas
    variance = entrywise(_variance, deltas)
    rank = variance.numel() + 1 - max(1, int(keep * int(variance.count_nonzero()) + 1e-9))
    return torch.where(variance >= kth(variance.flatten(), rank), deltas, 0)


def _variance(deltas: Tensor) -> Tensor:
    """Over K, [m] of [K, m]; `torch.var` takes ten times as long along the first axis."""
    wide = deltas.double() - deltas[0]  # zeros where all agree, whatever a mean is rounded to
    return (wide - wide.mean(0)).square_().mean(0).to(deltas.dtype)
