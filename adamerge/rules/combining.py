"""The stages of a merge, tensor by tensor and, where the rules allow, piece by piece."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints import meta, rows_of
from adamerge.deltas import LowRank, dense
from adamerge.differences import pieces
from adamerge.kinds import kind
from adamerge.rules.base import Changes, Correction, Rule, Stack
from adamerge.rules.linear import Mean
from adamerge.scales import Scale, per_tensor
from adamerge.task_vectors import TaskVectors


class MergedState(Mapping[str, Tensor]):
    """The merged state dict, computed when it is asked for; the passes that the rules need are made at once.

    θ = θ₀ + scale · correct(combine(τ₁ … τ_K)), or correct(scale · combine(τ₁ … τ_K)) for a `Correction` that is
    `scaled`. Running statistics are averaged, constants come from the base, tied
    tensors are merged once, and what has no delta stays the base's. In the base's dtype, or in another `dtype`.
    """

    def __init__(
        self,
        original: TaskVectors,
        transformed: TaskVectors,
        rule: Rule[Any],
        corrections: Sequence[Correction[Any]] = (),
        scale: Scale = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        rule.check(original.tasks)
        self._scale = per_tensor(scale, original.deltas)
        self.original, self.transformed, self.rule, self.dtype = original, transformed, rule, dtype
        self._statistics = rule.fit(transformed)
        elementwise = rule.elementwise and all(correction.elementwise for correction in corrections)
        self.elementwise = elementwise and self.transformed.elementwise
        self._corrections: list[tuple[Correction[Any], Any]] = []
        names = tuple(name for name in original.deltas if kind(name, meta(original.base, name)) == "parameter")
        for correction in corrections:
            self._corrections.append((correction, correction.fit(Changes(names, original.tasks, self.changes))))

    def __getitem__(self, name: str) -> Tensor:
        parts = list(self.parts(name))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __contains__(self, name: object) -> bool:
        return name in self.original.base

    def __iter__(self) -> Iterator[str]:
        return iter(self.original.base)

    def __len__(self) -> int:
        return len(self.original.base)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The merged tensor as consecutive rows: never more than a piece of it in memory."""
        return (self.part(name, rows) for rows in self.pieces(name))

    def pieces(self, name: str) -> Iterator[slice | None]:
        """The rows of each part of a tensor, or None for all of it."""
        name = self.original.tied.get(name, name)
        shape = meta(self.original.base, name).shape
        whole = name in self.original.deltas and not self.elementwise
        return iter((None,)) if whole else pieces(shape)

    @torch.no_grad()
    def part(self, name: str, rows: slice | None) -> Tensor:
        """Some rows of a merged tensor, in the dtype that `meta` says."""
        name = self.original.tied.get(name, name)
        dtype = self.meta(name).dtype
        if name not in self.original.deltas:
            base = self.original.base
            return (base[name] if rows is None else rows_of(base, name, rows)).to(dtype, copy=True)
        stack = _stack(self.transformed, name, rows)
        if kind(name, stack.base) == "statistics" and not self.rule.keeps_statistics:
            merged = Mean().merged(stack, None, 1.0)
        elif self._corrections:
            merged = stack.base + self._scale[name] * self._corrected(stack, rows)[1]
        else:
            merged = self.rule.merged(stack, self._statistics, self._scale[name])
        return merged.to(dtype)

    def meta(self, name: str) -> Tensor:
        """A tensor of the merged one's shape and dtype, without data."""
        like = meta(self.original.base, name)
        dtype = self.dtype if self.dtype is not None and like.is_floating_point() else like.dtype
        return torch.empty(like.shape, dtype=dtype, device="meta")

    @torch.no_grad()
    def changes(self) -> Iterator[tuple[Stack, Tensor]]:
        """Every parameter tensor, or piece of one, as it was before any transform, and its change so far."""
        for name in self.original.deltas:
            if kind(name, meta(self.original.base, name)) == "parameter":
                for rows in self.pieces(name):
                    yield self._corrected(_stack(self.transformed, name, rows), rows)

    def change(self, name: str) -> Tensor:
        """The change of one parameter tensor, [*shape], before the scale."""
        return self._corrected(_stack(self.transformed, name, None), None)[1]

    def _corrected(self, stack: Stack, rows: slice | None) -> tuple[Stack, Tensor]:
        """The stack before any transform, and the change of it after all corrections that are fitted."""
        change = self.rule.combine(stack, self._statistics)
        if self.transformed is not self.original:
            stack = _stack(self.original, stack.name, rows)
        scale = self._scale[stack.name]
        for correction, fitted in self._corrections:
            if correction.scaled and scale:
                change = correction.correct(stack, scale * change, fitted) / scale
            else:
                change = correction.correct(stack, change, fitted)
        return stack, change


def _stack(task_vectors: TaskVectors, name: str, rows: slice | None) -> Stack:
    base, deltas = task_vectors.piece(name, rows)
    factors = deltas if isinstance(deltas, LowRank) else None
    return Stack(name, base.to(deltas.dtype), dense(deltas), task_vectors.tasks, factors)


@torch.no_grad()
def combined(task_vectors: TaskVectors, rule: Rule[Any], scale: float) -> dict[str, Tensor]:
    """One rule over all tensors, in memory."""
    state = MergedState(task_vectors, task_vectors, rule, scale=scale)
    return in_memory(state, task_vectors.tied)


def in_memory(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """All tensors of a lazy state; those that are tied remain one."""
    own = {name: state[name] for name in state if name not in tied}
    return {name: own[tied.get(name, name)] for name in state}
