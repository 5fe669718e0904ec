"""Functional dual anchors: inputs, made without data, whose gradient points along a task vector."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adamerge.checkpoints import State


class Anchors(NamedTuple):
    """What a task vector stands for, as inputs.

    Attributes:
        inputs: [N, ...].
        before: the mean over tensors of the cosine between gradient and task vector, for the inputs at the start.
        after: the same for these inputs.
    """

    inputs: Tensor
    before: float
    after: float


def similarity(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cosine of two outputs [N, ...] as flat vectors, [N], computed in float32 at least."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    return F.cosine_similarity(outputs.flatten(1).to(dtype), targets.flatten(1).to(dtype))


def alignment(function: Callable[[State, Tensor], Tensor], base: State, expert: State, inputs: Tensor) -> Tensor:
    """cos(∇_θ₀ mean_j s(f(x_j; θ₀), f(x_j; θₖ)), τₖ) of every tensor that the expert changed, with s = `similarity`.

    Args:
        function: f, outputs [N, ...] of (state dict, inputs [N, ...]), twice differentiable.
        base: θ₀.
        expert: θₖ, by the same names.
        inputs: x, [N, ...].

    Returns:
        [tensors], differentiable in the inputs.
    """
    changed = _changed(base, expert)
    learned = {name: base[name].detach().requires_grad_() for name in changed}
    alike = similarity(function({**base, **learned}, inputs), function(expert, inputs)).mean()
    gradients = torch.autograd.grad(alike, list(learned.values()), create_graph=True)
    pairs = zip(gradients, changed, strict=True)
    return torch.stack([F.cosine_similarity(g.flatten(), (expert[n] - base[n]).flatten(), 0) for g, n in pairs])


def find_anchors(
    function: Callable[[State, Tensor], Tensor],
    base: State,
    expert: State,
    start: Tensor,
    steps: int,
    lr: float = 1e-2,
) -> Anchors:
    """Move inputs until a step from θ₀ that makes their outputs the expert's is a step along τₖ (arXiv:2510.21223).

    max_x Σ_l cos_l(x), the sum of `alignment` over tensors, by AdamW from `start`; the best inputs on the way count.
    Published starts are 0.01 · N(0, 1) and rows of the expert's weights: no data is needed. Where the expert is the
    base, the start is returned, and the cosines are 0.
    """
    if not _changed(base, expert):
        return Anchors(start, 0.0, 0.0)
    inputs = start.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([inputs], lr=lr)
    first = best = -1.0
    found = start
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # other attention kernels have no second derivative
        for step in range(steps + 1):
            cosines = alignment(function, base, expert, inputs)
            value = cosines.mean().item()
            first = value if step == 0 else first
            if value > best:
                best, found = value, inputs.detach().clone()
            if step < steps:
                (inputs.grad,) = torch.autograd.grad(-cosines.sum(), inputs)
                optimizer.step()
    return Anchors(found, first, best)


def _changed(base: State, expert: State) -> list[str]:
    return [name for name in base if not torch.equal(base[name], expert[name])]
