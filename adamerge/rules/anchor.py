"""Task vectors from another point than the base."""

import torch

from adamerge.deltas import AnyDeltas, dense
from adamerge.errors import InputError
from adamerge.rules.base import Rule, Transform
from adamerge.rules.combining import combined
from adamerge.rules.linear import TaskArithmetic
from adamerge.task_vectors import TaskVectors


class Rebase(Transform):
    """A merge takes the base's place, and task vectors lead from there to the experts (Twin-Merging, arXiv:2406.15479).

    θ* = merge(θ₀, τ₁ … τ_K) becomes the base and vₖ = θₖ − θ* the deltas: what the shared part lacks of each expert.
    The experts stay what they are, `expert(task)` gives the same weights as before up to rounding. Running statistics,
    constants and tensors that no expert changed keep their base and deltas. Task vectors over files are loaded.

    Fingerprints stay those of the base and experts that went in: θ* follows from them and this transform's arguments.

    Args:
        rule: what makes θ*.
        scale: factor on the combined task vector.
    """

    sums = False

    def __init__(self, rule: Rule = TaskArithmetic(), scale: float = 0.3) -> None:  # type: ignore[type-arg]  # noqa: B008
        if not isinstance(rule, Rule):
            raise InputError(f"Rebase takes a rule and then a scale, got {rule!r} for the rule: write scale={rule!r}")
        self.rule, self.scale = rule, scale

    @torch.no_grad()
    def __call__(self, task_vectors: TaskVectors) -> TaskVectors:
        old = task_vectors.load()
        anchor = combined(old, self.rule, self.scale)
        rows = frozenset(old.rows)
        base = {name: anchor[name] if old.tied.get(name, name) in rows else value for name, value in old.base.items()}

        def change(name: str, deltas: AnyDeltas) -> AnyDeltas:
            if name not in rows:
                return deltas
            moved = dense(deltas)
            return moved + (old.base[name].to(moved.dtype) - anchor[name].to(moved.dtype))

        return old.changed(change, base)
