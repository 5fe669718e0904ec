"""Regression means: layers that answer the experts' inputs as the experts do."""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.observing import Measure
from adamerge.rules.base import Rule, Stack
from adamerge.statistics import Informed, Statistics


def shrunk(gram: Tensor, rho: float) -> Tensor:
    """ρ G + (1 − ρ) diag G, [n, n], in float64."""
    gram = gram.double()
    return rho * gram + (1 - rho) * torch.diag(gram.diagonal())


def regression_mean(
    deltas: Tensor, grams: Iterable[Tensor], rho: float, ridge: float, relative: bool = False, name: str = "a tensor"
) -> Tensor:
    """The least-squares solution of Σₖ |(X − τₖ) xₖ|²: X = (Σₖ τₖ Ĝₖ) (Σₖ Ĝₖ)⁻¹.

    With Ĝₖ = ρ Gₖ + (1 − ρ) diag Gₖ + ε I. The ridge pulls to the mean of the experts, not to zero: inputs that are
    always 0 leave the mean, and experts that agree come out as they are.

    Args:
        deltas: τ, [K, m, n].
        grams: G, K of [n, n], each read when its turn comes.
        rho: ρ.
        ridge: ε as a fraction of the mean of all diagonals.
        relative: divide every expert's errors by E|τₖ xₖ|², so that those that went far do not outvote the others.
        name: of the tensor, for errors.

    Returns:
        [m, n].

    Raises:
        InputError: where the sum of the Grams is not positive definite.
    """
    total = torch.zeros(deltas.shape[-1], deltas.shape[-1], dtype=torch.float64, device=deltas.device)
    moment = torch.zeros(deltas.shape[1:], dtype=torch.float64, device=deltas.device)
    # Around the mean, so that what all experts share is exact.
    mean = deltas.double().mean(0)
    for delta, gram in zip(deltas, grams, strict=True):
        gram = shrunk(gram.to(deltas.device), rho)
        if relative:
            gram = gram / (float(torch.sum((delta.double() @ gram) * delta.double())) or 1.0)
        total += gram
        moment += (delta.double() - mean) @ gram
    # A ridge on every Gram adds ε Σₖ (τₖ − mean) = 0 to the moment.
    total.diagonal().add_(ridge * float(total.diagonal().mean()) or 1.0)
    factor, failed = torch.linalg.cholesky_ex(total)
    if failed:
        raise InputError(f"{name}: the sum of its Grams is singular; use a larger ridge than {ridge} or rho below 1")
    return (mean + torch.cholesky_solve(moment.T, factor).T).to(deltas.dtype)


class RegMean(Informed, Rule[Statistics]):
    """RegMean (arXiv:2212.09849): each linear layer as the regression on what the experts' layers answer to their data.

    W = (Σₖ Wₖ Ĝₖ) (Σₖ Ĝₖ)⁻¹ with Gₖ = E[x xᵀ] over the tokens that reach the layer in expert k and
    Ĝₖ = ρ Gₖ + (1 − ρ) diag Gₖ; see `regression_mean`. All else (biases, norms, convolutions, embeddings, layers of
    which no Gram was measured) is the mean of the experts. Needs no labels.

    Args:
        statistics: with the "gram" of every expert (`adamerge.statistics.collect`), or a folder of them.
        rho: ρ, 0 ≤ ρ ≤ 1. Larger ones trust the correlations of inputs more; 0.95 is 2 points better than the 0.6 of
            older tables.
        ridge: keeps the sum of the Grams positive definite, as a fraction of its mean diagonal.
        relative: count each expert's errors relative to how far it moved the layer's outputs, E|τₖ x|². The published
            rule does not, and follows the experts with the largest task vectors.
    """

    measures: ClassVar[tuple[Measure, ...]] = ("gram",)

    def __init__(
        self,
        statistics: Statistics | str | Path | None = None,
        rho: float = 0.95,
        ridge: float = 1e-6,
        relative: bool = False,
    ) -> None:
        if not (0 <= rho <= 1 and 0 < ridge < float("inf")):
            raise InputError(f"expected 0 <= rho <= 1 and ridge > 0 in {type(self).__name__}, got {rho} and {ridge}")
        self.statistics, self.rho, self.ridge, self.relative = statistics, rho, ridge, relative

    def fit(self, task_vectors: object) -> Statistics:
        """The statistics, opened."""
        return self.opened()

    def combine(self, stack: Stack, statistics: Statistics) -> Tensor:
        flipped = statistics.transposed(stack.name)
        deltas = stack.deltas.mT if flipped else stack.deltas
        size = deltas.shape[-1]
        grams = statistics.of_layer(self.measures[0], stack.name, stack.tasks, size) if deltas.dim() == 3 else None
        if grams is None:
            return stack.deltas.mean(0)
        merged = regression_mean(deltas, grams, self.rho, self.ridge, self.relative, stack.name)
        return merged.T if flipped else merged


class RegMeanPlusPlus(RegMean):
    """RegMean++ (arXiv:2508.03121): RegMean with the inputs that layers will have in the merge, not in the experts.

    The Grams are those of each expert's block behind the blocks that are merged already: see
    `adamerge.relay.collect_through`, which must have had the same rho and ridge. Else as `RegMean`.
    """

    measures = ("merged_gram",)
