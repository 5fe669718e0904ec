"""Entries that several experts need."""

from torch import Tensor

from adamerge.errors import InputError
from adamerge.rules.base import Changes, Correction, Stack
from adamerge.rules.masks import tall_mask


class Consensus(Correction[None]):
    """Consensus merging (arXiv:2405.07813): what fewer than `agree` experts need is left out of the merge.

    Entries stay where Σₖ Mₖ ≥ agree, with the TALL masks Mₖ = 1[|τₖ| > λ |τ − τₖ|] of the task vectors before any
    transform and the merged one, τ, before any scale. After `TaskArithmetic` or `ElectSign("sum")` it is what the
    paper calls Consensus TA and Consensus TIES; a mean is K times smaller than what λ is meant for.

    Args:
        threshold: λ ≥ 0. The paper picks one per task by validation from 0.2 to 0.6; 0.4 for all needs no data.
        agree: 2 or more drops what no expert or only one needs; 1 drops the former alone.
    """

    elementwise = True
    passes = 0

    def __init__(self, threshold: float = 0.4, agree: int = 2) -> None:
        if threshold < 0 or agree < 1:
            raise InputError(f"expected threshold >= 0 and agree >= 1 in Consensus, got {threshold} and {agree}")
        self.threshold, self.agree = threshold, agree

    def fit(self, changes: Changes) -> None:
        if len(changes.tasks) < self.agree:
            raise InputError(
                f"Consensus keeps what {self.agree} experts or more need, and there is {', '.join(changes.tasks)} "
                "alone: nothing would be left; add experts or make agree smaller"
            )

    def correct(self, stack: Stack, change: Tensor, statistics: None) -> Tensor:
        return change * (tall_mask(stack.deltas, change, self.threshold).sum(0) >= self.agree)
