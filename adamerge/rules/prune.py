"""Pruning by magnitude, tensor by tensor."""

import math
import re

import torch
from torch import Tensor

from adamerge.deltas import AnyDeltas, Sparse, dense
from adamerge.errors import InputError
from adamerge.rules.base import PerTensor


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
        # Above an interpolated quantile lies what lies above the value just below it. kthvalue has no limit of size,
        # as torch.quantile has. The small number outweighs the rounding of 1 − keep.
        rank = 1 + math.floor((1 - self.keep) * (delta.numel() - 1) + 1e-6)
        return torch.where(magnitude > magnitude.flatten().kthvalue(rank).values, delta, 0)
