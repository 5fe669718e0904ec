"""Arguments of rules that weigh the experts, or take a certain number of them."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from adamerge.errors import InputError

#: One weight for all experts, one for each in their order, or one for each by name.
Weights: TypeAlias = float | list[float] | dict[str, float]


def check_count(count: int, tasks: tuple[str, ...], owner: str) -> None:
    """Raise InputError for another number of experts than `owner` takes."""
    if len(tasks) != count:
        experts = "expert" if count == 1 else "experts"
        raise InputError(f"{owner} takes {count} {experts}, got {len(tasks)}: {', '.join(tasks)}")


def per_task(weights: Weights, tasks: tuple[str, ...], owner: str) -> list[float]:
    """The weight of each expert, in their order; raises InputError for weights of others, and for NaN and infinity."""
    if isinstance(weights, Mapping):
        if sorted(weights) != sorted(tasks):
            raise InputError(f"{owner} has weights for {sorted(weights)}, the experts are {sorted(tasks)}")
        values = [float(weights[task]) for task in tasks]
    elif isinstance(weights, Sequence):
        if len(weights) != len(tasks):
            raise InputError(f"{owner} has {len(weights)} weights for {len(tasks)} experts: {', '.join(tasks)}")
        values = [float(weight) for weight in weights]
    else:
        values = [float(weights)] * len(tasks)
    if not all(map(math.isfinite, values)):
        raise InputError(f"{owner} has weights {values}: expected finite numbers")
    return values


def shares(weights: Weights, tasks: tuple[str, ...], owner: str) -> list[float]:
    """As `per_task`, divided by their sum; raises InputError where that is 0."""
    values = per_task(weights, tasks, owner)
    total = sum(values)
    if abs(total) <= 1e-9 * sum(map(abs, values)):
        raise InputError(f"the weights of {owner}, {values}, sum to 0 and cannot be normalised: give others")
    return [value / total for value in values]


def weighted_sum(tensors: Tensor, weights: Sequence[float]) -> Tensor:
    """Σₖ wₖ tensorsₖ for [K, *shape]; the same bits whatever the shape."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor
    return total
