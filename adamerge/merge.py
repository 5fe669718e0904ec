"""Static merging: transforms, then one rule over all tensors, then corrections."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.fused import Joined, split
from adamerge.rules import Correction, ElectSign, Fold, Rule, TaskArithmetic, Transform, WeightRule, transform
from adamerge.rules.base import check_transforms
from adamerge.rules.combining import MergedState, in_memory
from adamerge.scales import Scale, matching
from adamerge.statistics import Informed
from adamerge.task_vectors import TaskVectors

#: What a list of rules may hold.
Step = Transform | Rule[Any] | Correction[Any]


@torch.no_grad()
def merge(
    task_vectors: TaskVectors,
    rules: Sequence[Step] = (TaskArithmetic(),),
    scale: Scale = 1.0,
    exclude: Sequence[str] = (),
    split_fused_qkv: bool = False,
) -> dict[str, Tensor]:
    """Merge experts into one state dict: θ = θ₀ + scale · combine(τ₁ … τ_K).

    Computed in float32 or better and cast to the base's dtype. Running statistics are averaged whatever the rule (a
    scaled sum could make a variance negative), constants come from the base, tied tensors are merged once.

    Args:
        task_vectors: base and deltas; not changed.
        rules: transforms in the order in which they apply, then the rule that combines, then corrections of the
            outcome, all of `adamerge.rules`. Where no rule combines, the sum is taken (`TaskArithmetic`).
            `[Trim(0.2), ElectSign("sum")]` is TIES, `[Consensus()]` is Consensus task arithmetic.
        scale: factor on the combined task vector; 1 for `Mean` and `LearnedCoefficients`, 0.3 is usual for
            `TaskArithmetic`. A list is a gradient over the blocks, `{"mlp": 0.5, ".*": [0.2, 0.4]}` is one by patterns
            of names (`adamerge.scales.per_tensor`).
        exclude: patterns of names: tensors that stay the base's, and that no rule counts.
        split_fused_qkv: merge queries, keys and values that are one tensor as three, `….query`, `….key`, `….value`: not
            the same where a rule looks at a tensor as a whole.

    Raises:
        InputError: for no rule or several, for stages that make no sense in this order, and for a pattern that matches
            no tensor.
    """
    planned = plan_split if split_fused_qkv else plan
    return in_memory(planned(task_vectors, rules, scale, exclude), task_vectors.tied)


@torch.no_grad()
def plan(
    task_vectors: TaskVectors,
    rules: Sequence[Step] = (TaskArithmetic(),),
    scale: Scale = 1.0,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> MergedState:
    """As `merge`, but each tensor is computed when it is asked for; passes over all tensors are made here.

    `dtype` is that of the merged floats, the base's by default.
    """
    transforms, rule, corrections = stages(rules)
    rule.check(task_vectors.tasks)
    for step in rules:
        if isinstance(step, Informed):
            step.check(task_vectors.tasks)
            step.examine(task_vectors)
    if exclude:
        names = list(task_vectors.base)
        task_vectors = task_vectors.without(name for pattern in exclude for name in matching(pattern, names))
    return MergedState(task_vectors, transform(task_vectors, transforms), rule, corrections, scale, dtype)


def plan_split(
    task_vectors: TaskVectors,
    rules: Sequence[Step] = (TaskArithmetic(),),
    scale: Scale = 1.0,
    exclude: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Joined:
    """As `plan`, with queries, keys and values that are fused in one tensor merged as three."""
    parts, thirds = split(task_vectors)
    return Joined(plan(parts, rules, scale, exclude, dtype), thirds, task_vectors.base)


def stages(rules: Sequence[Step]) -> tuple[list[Transform], Rule[Any], list[Correction[Any]]]:
    """The transforms, the rule that combines, the corrections; raises InputError for a list that makes no sense."""
    transforms = [step for step in rules if isinstance(step, Transform)]
    combining: list[Rule[Any]] = [step for step in rules if isinstance(step, Rule) and not isinstance(step, Transform)]
    corrections = [step for step in rules if isinstance(step, Correction)]
    names = [type(step).__name__ for step in rules]
    if len(combining) > 1 or not rules:
        raise InputError(f"expected one merging rule, got {len(combining)}: {names}")
    if list(rules[len(rules) - len(corrections) :]) != corrections:
        raise InputError(f"{type(corrections[0]).__name__} corrects what a rule has combined: put it after the others")
    if combining and combining[0] is not rules[-len(corrections) - 1]:
        raise InputError(f"{type(combining[0]).__name__} combines the experts: put it last in the list of rules")
    check_transforms(transforms)
    if not combining and transforms:
        last = transforms[-1]
        if isinstance(last, Rule):
            return transforms[:-1], last, corrections
        if last.per_task:
            raise InputError(
                f"{type(last).__name__} gives one model per task: write them with `adamerge compress`, or use "
                "transform(task_vectors, rules).expert(task); or end the list with a rule that combines them"
            )
        if not last.sums:
            raise InputError(f"{type(last).__name__} does not combine the experts: end the list with a rule that does")
    rule = combining[0] if combining else TaskArithmetic()
    for step in transforms:
        if isinstance(step, ElectSign) and step.mean:
            raise InputError(
                f"ElectSign('mean') combines the experts, and so does {type(rule).__name__}: leave one out, or use "
                "ElectSign('sum') to elect alone"
            )
    if isinstance(rule, Fold) and len(rules) > 1:
        other = next(name for name in names if name != "Fold")
        raise InputError(
            f"Fold lets an expert join a merge, and {other} would change that merge once more: leave {other} out, or "
            "merge all experts anew"
        )
    if isinstance(rule, WeightRule) and transforms:
        raise InputError(
            f"{type(rule).__name__} merges the experts' weights, not their task vectors: "
            f"{type(transforms[-1]).__name__} before it makes no sense; leave one of the two out"
        )
    return transforms, rule, corrections
