"""Static merging: one rule over all tensors."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.kinds import kind
from adamerge.rules import Mean, Rule, TaskArithmetic
from adamerge.task_vectors import TaskVectors


@torch.no_grad()
def merge(
    task_vectors: TaskVectors, rules: Sequence[Rule] = (TaskArithmetic(),), scale: float = 1.0
) -> dict[str, Tensor]:
    """Merge experts into one state dict: θ = θ₀ + scale · combine(τ₁ … τ_K).

    Computed in float32 or better and cast to the base's dtype. Running statistics are averaged whatever the rule (a
    scaled sum could make a variance negative), constants come from the base, tied tensors are merged once.

    Args:
        task_vectors: base and deltas; not changed.
        rules: the merging rule, one of `adamerge.rules`.
        scale: factor on the combined task vector; 1 for `Mean` and `LearnedCoefficients`, 0.3 is usual for
            `TaskArithmetic`.
    """
    if len(rules) != 1:
        raise InputError(f"expected one merging rule, got {len(rules)}: {[type(rule).__name__ for rule in rules]}")
    state = dict(_merged(task_vectors, rules[0], scale))
    return {name: state[task_vectors.tied.get(name, name)] for name in task_vectors.base}


def _merged(task_vectors: TaskVectors, rule: Rule, scale: float) -> Iterator[tuple[str, Tensor]]:
    for name, base in task_vectors.base.items():
        if name in task_vectors.tied:
            continue
        if kind(name, base) == "constant":
            yield name, base.clone()
            continue
        deltas = task_vectors.deltas[name]
        applied, factor = (Mean(), 1.0) if kind(name, base) == "statistics" else (rule, scale)
        yield name, applied.apply(name, base.to(deltas.dtype), deltas, task_vectors.tasks, factor).to(base.dtype)
