"""A static merge in the experts' place."""

import torch
from torch import Tensor

from adamerge.deltas import AnyDeltas
from adamerge.errors import InputError
from adamerge.packed import Packed
from adamerge.rules.base import Correction, Rule, Transform, transform
from adamerge.task_vectors import TaskVectors


class Merged(Transform):
    """What a static merge makes of the experts, in K equal parts: τₖ = τ_m / K, so that Σₖ λ τₖ = λ τ_m.

    One coefficient for everything is then the scale of the merge; one for each block or tensor scales them apart. The
    parts are held as one tensor. Running statistics keep their deltas: as in any merge, their mean is taken. Task
    vectors over files are loaded.

    Raises InputError for rules that move the base (`Rebase`, `Cart`): these go before it, or stand alone.

    Args:
        rules: as for `adamerge.merge`: transforms, the rule that combines (default: the sum), corrections.
    """

    votes = True

    def __init__(self, rules: list[Transform | Rule | Correction]) -> None:  # type: ignore[type-arg]
        from adamerge.merge import stages  # which knows all rules

        stages(rules)
        self.rules = list(rules)

    @torch.no_grad()
    def __call__(self, task_vectors: TaskVectors) -> TaskVectors:
        from adamerge.merge import stages
        from adamerge.rules.combining import MergedState

        old = task_vectors.load()
        transforms, rule, corrections = stages(self.rules)
        transformed = transform(old, transforms)
        if transformed.base is not old.base:
            names = ", ".join(type(step).__name__ for step in transforms)
            raise InputError(
                f"Merged keeps the base, and one of {names} moves it: list it among the transforms instead"
            )
        changes: dict[str, list[Tensor]] = {}
        for stack, change in MergedState(old, transformed, rule, corrections).changes():
            changes.setdefault(stack.name, []).append(change)

        def part(name: str, deltas: AnyDeltas) -> AnyDeltas:
            if name not in changes:
                return deltas
            pieces = changes.pop(name)
            shared = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            return Packed(shared.new_full((len(old.tasks),), 1 / len(old.tasks)), deltas.shape, shared)

        return old.changed(part)
