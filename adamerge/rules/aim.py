"""Activation-informed merging: the base's most used inputs change least."""

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from adamerge.errors import InputError
from adamerge.fingerprint import BASE
from adamerge.observing import Measure
from adamerge.rules.base import Changes, Correction, Stack
from adamerge.statistics import Informed, Statistics


class Aim(Informed, Correction[Statistics]):
    """Activation-informed merging (arXiv:2502.02421): what the base relies on is kept from changing.

    Column j of a linear layer's merged change, and entry j of a norm's weight, times 1 − (1 − ω) aⱼ / maxᵢ aᵢ, with
    aⱼ the mean of |xⱼ| over the tokens that the base sees there. Biases, embeddings and whatever was not measured stay
    as they are. Needs no labels; the data may be general text or images that belong to no task.

    Args:
        statistics: with the "magnitude" of the base (`adamerge.statistics.collect` of one expert called "base"), or
            their folder.
        omega: ω, what is left of the change of the most used input; the paper takes 0.2 to 0.6.
    """

    measures: ClassVar[tuple[Measure, ...]] = ("magnitude",)
    of_base = True
    passes = 0

    def __init__(self, statistics: Statistics | str | Path | None = None, omega: float = 0.4) -> None:
        if not 0 <= omega <= 1:
            raise InputError(f"expected 0 <= omega <= 1 in Aim, got {omega}")
        self.statistics, self.omega = statistics, omega

    def fit(self, changes: Changes) -> Statistics:
        """The statistics, opened."""
        self.check(changes.tasks)
        return self.opened()

    def correct(self, stack: Stack, change: Tensor, statistics: Statistics) -> Tensor:
        magnitude = statistics.find("magnitude", BASE, stack.name)
        if magnitude is None:
            return change
        axis = 0 if statistics.transposed(stack.name) else -1
        if not change.dim() or change.shape[axis] != len(magnitude):
            shapes = f"{list(magnitude.shape)}, the tensor {list(change.shape)}"
            raise InputError(f"{stack.name}: the magnitude of the base's inputs has shape {shapes}")
        factors = relevance_factors(magnitude.to(change), self.omega)
        return change * (factors[:, None] if axis == 0 and change.dim() > 1 else factors)


def relevance_factors(magnitude: Tensor, omega: float) -> Tensor:
    """1 − (1 − ω) a / max a for a ≥ 0 [n]; 1 where all of a is 0."""
    largest = magnitude.max()
    return 1 - (1 - omega) * magnitude / (largest if largest > 0 else 1)
