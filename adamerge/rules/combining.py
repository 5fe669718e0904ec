"""One rule over all tensors."""

from collections.abc import Iterator

from torch import Tensor

from adamerge.deltas import dense
from adamerge.kinds import kind
from adamerge.rules.base import Rule, Transform
from adamerge.rules.linear import Mean
from adamerge.task_vectors import TaskVectors


def combined(task_vectors: TaskVectors, rule: Rule, scale: float) -> dict[str, Tensor]:
    """The state dict θ₀ + scale · combine(τ₁ … τ_K), one tensor at a time; a rule that transforms first does so."""
    if isinstance(rule, Transform):
        task_vectors = rule(task_vectors)
    state = dict(_tensors(task_vectors, rule, scale))
    return {name: state[task_vectors.tied.get(name, name)] for name in task_vectors.base}


def _tensors(task_vectors: TaskVectors, rule: Rule, scale: float) -> Iterator[tuple[str, Tensor]]:
    for name, base in task_vectors.base.items():
        if name in task_vectors.tied:
            continue
        if kind(name, base) == "constant":
            yield name, base.clone()
            continue
        deltas = dense(task_vectors.deltas[name])
        applied, factor = (Mean(), 1.0) if kind(name, base) == "statistics" else (rule, scale)
        yield name, applied.apply(name, base.to(deltas.dtype), deltas, task_vectors.tasks, factor).to(base.dtype)
