"""Gradient descent for rules that know their gradient."""

from collections.abc import Callable

import torch
from torch import Tensor


def adam(start: Tensor, gradient: Callable[[Tensor], Tensor], steps: int, lr: float) -> Tensor:
    """`start` after some steps of Adam (arXiv:1412.6980) with its usual constants; no graph, and no optimizer's import.

    Args:
        start: [*shape]; not changed.
        gradient: of the loss, [*shape] at [*shape].
        steps: how many.
        lr: the learning rate.
    """
    value, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        slope = gradient(value)
        mean.lerp_(slope, 0.1)
        square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        size = (square / (1 - 0.999**step)).sqrt_().add_(1e-8)
        value.addcdiv_(mean, size, value=-lr / (1 - 0.9**step))
    return value
