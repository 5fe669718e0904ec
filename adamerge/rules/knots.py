"""Merging in coordinates that the experts share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import dense
from adamerge.errors import InputError
from adamerge.kinds import kind
from adamerge.linalg import leading
from adamerge.rules.base import Correction, Rule, Stack, Transform, WeightRule, transform
from adamerge.rules.combining import MergedState
from adamerge.rules.magnitudes import kth
from adamerge.rules.matrices import LINEAR, Matrices, rounding, side_by_side
from adamerge.rules.ties import Trim
from adamerge.task_vectors import TaskVectors


def shared_basis(deltas: Tensor, name: str, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """U [m, r] of [Δ₁ … Δ_K] = U S [V₁ … V_K]ᵀ, and the coordinates S Vₖᵀ [K, r, n], for deltas [K, m, n].

    Over the singular values above `least`, the largest first.
    """
    fat = side_by_side(deltas.double())
    basis, values, right = leading(fat, min(fat.shape), name, least)
    kept = values > max(least, 0)
    coordinates = values[kept].unsqueeze(1) * right[kept]
    return basis[:, kept], coordinates.unflatten(1, (len(deltas), -1)).transpose(0, 1)


@dataclass(frozen=True)
class Coordinates:
    """The merge of the experts' coordinates, and by name the bases that lead back."""

    state: MergedState
    bases: dict[str, Tensor]


class KnOts(Rule[Coordinates]):
    """Merging in shared coordinates (KnOTS, arXiv:2410.19735): the experts' matrices are aligned, and then combined.

    Side by side, the K deltas [m, n] of a matrix are [Δ₁ … Δ_K] = U S [V₁ … V_K]ᵀ. In the basis U expert k has the
    coordinates S Vₖᵀ = Uᵀ Δₖ; `rules` combine these into C, and the merge is U C. Entries of coordinates mean the same
    for all experts, entries of matrices need not: above all where each was trained as low-rank factors of its own. A
    rule that is linear gives what it gives anyway. Thresholds over all tensors are over all coordinates, of which there
    are as many rows as the deltas have rank. What is no matrix is combined by the same rules as it is. Coordinates are
    held in memory.

    Args:
        rules: transforms and the rule that combines, as for `adamerge.merge`; `[Trim(0.2), ElectSign("mean")]` is
            KnOTS-TIES. In coordinates the base is the origin: rules over weights make no sense.
        vertical: share V of the deltas one below the other, instead of U.
        matrices: which tensors are matrices.
    """

    def __init__(
        self,
        rules: list[Transform | Rule],  # type: ignore[type-arg]
        vertical: bool = False,
        matrices: Matrices = LINEAR,
    ) -> None:
        from adamerge.merge import stages  # which knows all rules

        self._transforms, self._rule, corrections = stages(rules)
        for step in (self._rule, *corrections):
            if isinstance(step, WeightRule | Correction):
                raise InputError(f"{type(step).__name__} does not work in the coordinates of KnOts: put it elsewhere")
        self.vertical, self.matrices = vertical, matrices

    def check(self, tasks: tuple[str, ...]) -> None:
        self._rule.check(tasks)

    def fit(self, task_vectors: TaskVectors) -> Coordinates:
        origin, coordinates, bases = {}, {}, {}
        for name in task_vectors.deltas:
            base, compressed = task_vectors.piece(name)
            if kind(name, base) != "parameter":
                continue
            deltas = dense(compressed)
            if self.matrices.match(name, base.shape) and bool(deltas.any()):
                stack = Stack(name, base.to(deltas.dtype), deltas, task_vectors.tasks)
                matrices = self._turned(deltas.flatten(2))
                basis, aligned = shared_basis(matrices, name, rounding(stack))
                bases[name], deltas = basis.to(deltas.dtype), aligned.to(deltas.dtype)
            coordinates[name], origin[name] = deltas, deltas.new_zeros(()).expand(deltas.shape[1:])
        # Coordinates are no experts, and have no fingerprints.
        shared = transform(TaskVectors(origin, coordinates, task_vectors.tasks, fingerprints={}), self._transforms)
        return Coordinates(MergedState(shared, shared, self._rule), bases)

    def combine(self, stack: Stack, statistics: Coordinates) -> Tensor:
        change = statistics.state.change(stack.name)
        if stack.name not in statistics.bases:
            return change
        return self._turned(statistics.bases[stack.name] @ change).reshape(stack.base.shape)

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.vertical else matrix


def drm(deltas: Tensor, keep: float, name: str, least: float = 0.0) -> Tensor:
    """Decomposed, renormalised, trimmed and elected: see `Drm`; [K, m, n] -> [m, n]."""
    basis, coordinates = (part.to(deltas.dtype) for part in shared_basis(deltas, name, least))
    strength = coordinates.square().sum((0, 2)).sqrt()
    coordinates = torch.where((strength > 1e-2 * strength.max()).view(-1, 1), coordinates, 0)
    norms = torch.linalg.vector_norm(coordinates, dim=2, keepdim=True)
    directions = (coordinates / torch.where(norms > 0, norms, 1)).abs()
    present = directions[directions > 0]
    drop = len(present) - max(1, round(keep * len(present)))
    threshold = kth(present, drop + 1)
    kept = torch.where(directions >= threshold, coordinates, 0)
    return basis @ agreed(kept)


def agreed(deltas: Tensor) -> Tensor:
    """The mean of what has the sign of the sum, entry by entry; [K, *shape] -> [*shape]."""
    agreeing = torch.where(deltas * deltas.sum(0).sign() > 0, deltas, 0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


class Drm(Rule[Tensor | None]):
    """Decompose, renormalise, merge (DRM, arXiv:2505.23117): TIES among directions of equal length.

    The coordinates Uᵀ Δₖ of `KnOts`, over directions with a singular value of 10⁻² or more of the largest, are split
    row by row into norms and directions of unit length. Over all experts, the `keep` share of largest entries of the
    directions stays, so that a weak row is not trimmed for being weak. With their norms back, the rows elect a sign
    entry by entry and those that agree are averaged, as in TIES. So are all other tensors, of which each expert keeps
    its share of largest entries over all of them (`Trim`). Needs no scale.

    Args:
        keep: 0 < keep ≤ 1, the share of entries that stay.
        vertical: as in `KnOts`.
        matrices: which tensors are matrices.
    """

    def __init__(self, keep: float = 0.2, vertical: bool = False, matrices: Matrices = LINEAR) -> None:
        if not 0 < keep <= 1:
            raise InputError(f"expected keep above 0 and up to 1 in Drm, got {keep}")
        self.keep, self.vertical, self.matrices, self._trim = keep, vertical, matrices, Trim(keep)

    def fit(self, task_vectors: TaskVectors) -> Tensor | None:
        """The smallest magnitude that each expert keeps in what is no matrix."""
        likes = {name: meta(task_vectors.base, name).shape for name in task_vectors.deltas}
        return self._trim.fit(task_vectors.without(n for n, shape in likes.items() if self.matrices.match(n, shape)))

    def combine(self, stack: Stack, statistics: Tensor | None) -> Tensor:
        if not bool(stack.deltas.any()):
            return torch.zeros_like(stack.base)
        if not self.matrices.match(stack.name, stack.base.shape):
            return agreed(dense(self._trim.tensor(stack.name, stack.deltas, statistics)))
        least, deltas = rounding(stack), self._turned(stack.deltas.flatten(2))
        return self._turned(drm(deltas, self.keep, stack.name, least)).reshape(stack.base.shape)

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.vertical else matrix
