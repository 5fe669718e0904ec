"""The entry that moved furthest."""

from functools import reduce

import torch
from torch import Tensor

from adamerge.rules.base import Folds, Rule, Stack


class MagMax(Rule[None], Folds):
    """Maximum magnitude selection (MagMax, arXiv:2407.06322): τᵢ = τₖᵢ of the expert k with the largest |τₖᵢ|.

    Among equal magnitudes, the later expert's is taken, so that experts may be added one by one in their order. Meant
    for experts fine-tuned one after the other, at scale 0.5.
    """

    elementwise = True

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        return reduce(larger, stack.deltas)

    def add(self, change: Tensor, delta: Tensor, count: int, name: str) -> Tensor:
        return larger(change, delta)


def larger(first: Tensor, second: Tensor) -> Tensor:
    """Entry by entry, whichever is larger in magnitude; the second where they are equal."""
    return torch.where(second.abs() >= first.abs(), second, first)
