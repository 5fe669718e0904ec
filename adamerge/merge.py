"""Static merging: transforms, then one rule over all tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.rules import ElectSign, Rule, TaskArithmetic, Transform, transform
from adamerge.rules.base import check_transforms
from adamerge.rules.combining import combined
from adamerge.task_vectors import TaskVectors


@torch.no_grad()
def merge(
    task_vectors: TaskVectors, rules: Sequence[Rule | Transform] = (TaskArithmetic(),), scale: float = 1.0
) -> dict[str, Tensor]:
    """Merge experts into one state dict: θ = θ₀ + scale · combine(τ₁ … τ_K).

    Computed in float32 or better and cast to the base's dtype. Running statistics are averaged whatever the rule (a
    scaled sum could make a variance negative), constants come from the base, tied tensors are merged once.

    Args:
        task_vectors: base and deltas; not changed.
        rules: transforms in the order in which they apply, then the rule that combines, all of `adamerge.rules`. After
            transforms alone, the sum is taken (`TaskArithmetic`). `[Trim(0.2), ElectSign("sum")]` is TIES.
        scale: factor on the combined task vector; 1 for `Mean` and `LearnedCoefficients`, 0.3 is usual for
            `TaskArithmetic`.

    Raises:
        InputError: for no rule or several, and for transforms that make no sense in this order.
    """
    transforms, rule = _split(rules)
    return combined(transform(task_vectors, transforms), rule, scale)


def _split(rules: Sequence[Rule | Transform]) -> tuple[list[Transform], Rule]:
    """The transforms, and the rule that combines."""
    combining = [rule for rule in rules if not isinstance(rule, Transform)]
    if len(combining) > 1 or not rules:
        raise InputError(f"expected one merging rule, got {len(combining)}: {[type(rule).__name__ for rule in rules]}")
    if combining and combining[0] is not rules[-1]:
        raise InputError(f"{type(combining[0]).__name__} combines the experts: put it last in the list of rules")
    check_transforms([rule for rule in rules if isinstance(rule, Transform)])
    last = rules[-1]
    if isinstance(last, Rule):
        transforms = [rule for rule in rules[:-1] if isinstance(rule, Transform)]
    elif last.sums:
        transforms, last = [rule for rule in rules if isinstance(rule, Transform)], TaskArithmetic()
    else:
        raise InputError(f"{type(last).__name__} does not combine the experts: end the list with a rule that does")
    for step in transforms:
        if isinstance(step, ElectSign) and step.mean:
            raise InputError(
                f"ElectSign('mean') combines the experts, and so does {type(last).__name__}: leave one out, or use "
                "ElectSign('sum') to elect alone"
            )
    return transforms, last
