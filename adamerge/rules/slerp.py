"""Spherical means of the experts, over the functions of `adamerge.rules.sphere`.

They act on weights, not on task vectors, unless asked otherwise: experts of one base are then nearly parallel, and the
outcome is close to a mean of weights.
"""

from abc import abstractmethod
from typing import Literal

from torch import Tensor

from adamerge.errors import InputError
from adamerge.rules.base import Stack, WeightRule
from adamerge.rules.sphere import Grain, karcher, multislerp, nuslerp, slerp
from adamerge.rules.weights import Weights, check_count, shares


class _Spherical(WeightRule[None]):
    """A mean on a sphere about the origin or about the base."""

    def __init__(self, on: Literal["weights", "task_vectors"]) -> None:
        if on not in ("weights", "task_vectors"):
            raise InputError(f"expected on to be 'weights' or 'task_vectors' in {type(self).__name__}, got {on!r}")
        self.on = on

    @abstractmethod
    def mean(self, tensors: Tensor, stack: Stack) -> Tensor:
        """The mean of [K, *shape]."""

    def weights(self, stack: Stack, statistics: None) -> Tensor:
        if self.on == "weights":
            return self.mean(stack.experts, stack)
        return stack.base + self.mean(stack.deltas, stack)


class Slerp(WeightRule[None]):
    """Spherical interpolation of two experts' weights, tensor by tensor.

    θ = (sin((1 − t)Ω) θ₁ + sin(tΩ) θ₂) / sin Ω with the angle Ω between the two tensors; see `slerp`. Either expert may
    be the base itself.

    Args:
        t: 0 ≤ t ≤ 1; 0 is the first expert, 1 the second.
    """

    def __init__(self, t: float = 0.5) -> None:
        if not 0 <= t <= 1:
            raise InputError(f"expected 0 <= t <= 1 in Slerp, got {t}")
        self.t = t

    def check(self, tasks: tuple[str, ...]) -> None:
        check_count(2, tasks, "Slerp")

    def weights(self, stack: Stack, statistics: None) -> Tensor:
        first, second = stack.experts
        return slerp(first, second, self.t)


class NuSlerp(_Spherical):
    """Spherical interpolation of two experts, given by weights, with a choice of what a vector is; see `nuslerp`.

    As `Slerp` with t = w₂ / (w₁ + w₂), and on a line only where two vectors are parallel to rounding.

    Args:
        weights: w₁ and w₂, or both by name.
        per: which vectors are turned: the whole "tensor", each "row" W[i], or each "column" W[:, j].
        on: "weights", or "task_vectors" for arcs about the base.
    """

    def __init__(
        self, weights: Weights = 1.0, per: Grain = "tensor", on: Literal["weights", "task_vectors"] = "weights"
    ) -> None:
        super().__init__(on)
        if per not in ("tensor", "row", "column"):
            raise InputError(f"expected per to be 'tensor', 'row' or 'column' in NuSlerp, got {per!r}")
        self.task_weights, self.per = weights, per

    def check(self, tasks: tuple[str, ...]) -> None:
        check_count(2, tasks, "NuSlerp")
        shares(self.task_weights, tasks, "NuSlerp")

    def mean(self, tensors: Tensor, stack: Stack) -> Tensor:
        first, second = tensors
        return nuslerp(first, second, shares(self.task_weights, stack.tasks, "NuSlerp")[1], self.per)


class MultiSlerp(_Spherical):
    """The weighted mean direction of any number of experts at their weighted mean length, tensor by tensor.

    θ = u · Σ wₖ|θₖ| with u ∝ Σ wₖ θₖ/|θₖ|; see `multislerp`. Raises InputError where directions cancel out.

    Args:
        weights: one for all experts, a list, or by name; divided by their sum.
        on: "weights", or "task_vectors" for directions from the base.
    """

    def __init__(self, weights: Weights = 1.0, on: Literal["weights", "task_vectors"] = "weights") -> None:
        super().__init__(on)
        self.task_weights = weights

    def check(self, tasks: tuple[str, ...]) -> None:
        shares(self.task_weights, tasks, "MultiSlerp")

    def mean(self, tensors: Tensor, stack: Stack) -> Tensor:
        return multislerp(tensors, shares(self.task_weights, stack.tasks, "MultiSlerp"), stack.name)


class Karcher(_Spherical):
    """The Karcher mean of the experts' directions at their mean length, tensor by tensor; see `karcher`.

    Raises InputError where directions cancel out.

    Args:
        max_iter: steps at most; 0 leaves the normalised mean.
        tol: a shorter step is the last one, and shorter tensors have no say in the direction.
        on: "weights", or "task_vectors" for directions from the base.
    """

    def __init__(
        self, max_iter: int = 10, tol: float = 1e-5, on: Literal["weights", "task_vectors"] = "weights"
    ) -> None:
        super().__init__(on)
        if max_iter < 0 or not tol > 0:
            raise InputError(f"expected max_iter >= 0 and tol > 0 in Karcher, got {max_iter} and {tol}")
        self.max_iter, self.tol = max_iter, tol

    def mean(self, tensors: Tensor, stack: Stack) -> Tensor:
        return karcher(tensors, self.max_iter, self.tol, stack.name)
