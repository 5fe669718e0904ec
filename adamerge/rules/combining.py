"""The stages of a merge, tensor by tensor and, where the rules allow, piece by piece."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import dense
from adamerge.kinds import kind
from adamerge.rules.base import Changes, Correction, Rule, Stack, Transform
from adamerge.rules.linear import Mean
from adamerge.task_vectors import TaskVectors, pieces


class MergedState(Mapping[str, Tensor]):
    """The merged state dict, computed when it is asked for; the passes that the rules need are made at once.

    θ = θ₀ + scale · correct(combine(τ₁ … τ_K)). Running statistics are averaged, constants come from the base, tied
    tensors are merged once.
    """

    def __init__(
        self,
        original: TaskVectors,
        transformed: TaskVectors,
        rule: Rule[Any],
        corrections: Sequence[Correction[Any]] = (),
        scale: float = 1.0,
    ) -> None:
        rule.check(original.tasks)
        if isinstance(rule, Transform):
            transformed = rule(transformed)
        self.original, self.transformed, self.rule, self.scale = original, transformed, rule, scale
        self._statistics = rule.fit(transformed)
        self._elementwise = rule.elementwise and all(correction.elementwise for correction in corrections)
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

    @torch.no_grad()
    def parts(self, name: str) -> Iterator[Tensor]:
        """The merged tensor as consecutive rows, in the base's dtype: never more than a piece of it in memory."""
        name = self.original.tied.get(name, name)
        like = meta(self.original.base, name)
        of_kind = kind(name, like)
        if of_kind == "constant":
            yield self.original.base[name].clone()
            return
        for rows in self._pieces(name):
            stack = _stack(self.transformed, name, rows)
            if of_kind == "statistics" and not self.rule.keeps_statistics:
                merged = Mean().merged(stack, None, 1.0)
            elif self._corrections:
                merged = stack.base + self.scale * self._corrected(stack, rows)[1]
            else:
                merged = self.rule.merged(stack, self._statistics, self.scale)
            yield merged.to(like.dtype)

    @torch.no_grad()
    def changes(self) -> Iterator[tuple[Stack, Tensor]]:
        """Every parameter tensor, or piece of one, as it was before any transform, and its change so far."""
        for name in self.original.deltas:
            if kind(name, meta(self.original.base, name)) == "parameter":
                for rows in self._pieces(name):
                    yield self._corrected(_stack(self.transformed, name, rows), rows)

    def _pieces(self, name: str) -> Iterator[slice | None]:
        whole = not (self._elementwise and self.transformed.elementwise)
        return iter((None,)) if whole else pieces(meta(self.original.base, name).shape)

    def _corrected(self, stack: Stack, rows: slice | None) -> tuple[Stack, Tensor]:
        """The stack before any transform, and the change of it after all corrections that are fitted."""
        change = self.rule.combine(stack, self._statistics)
        if self.transformed is not self.original:
            stack = _stack(self.original, stack.name, rows)
        for correction, fitted in self._corrections:
            change = correction.correct(stack, change, fitted)
        return stack, change


def _stack(task_vectors: TaskVectors, name: str, rows: slice | None) -> Stack:
    base, deltas = task_vectors.piece(name, rows)
    return Stack(name, base.to(deltas.dtype), dense(deltas), task_vectors.tasks)


@torch.no_grad()
def combined(task_vectors: TaskVectors, rule: Rule[Any], scale: float) -> dict[str, Tensor]:
    """One rule over all tensors, in memory."""
    state = MergedState(task_vectors, task_vectors, rule, scale=scale)
    return in_memory(state, task_vectors.tied)


def in_memory(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """All tensors of a lazy state; those that are tied remain one."""
    own = {name: state[name] for name in state if name not in tied}
    return {name: own[tied.get(name, name)] for name in state}
