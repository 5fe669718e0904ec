"""A base that the experts agree on, and low-rank task vectors from there."""

import torch
from torch import Tensor

from adamerge.deltas import AnyDeltas, dense
from adamerge.errors import InputError
from adamerge.linalg import leading
from adamerge.rules.base import Transform
from adamerge.rules.matrices import TWO_AXES, Matrices
from adamerge.task_vectors import TaskVectors


def shrunk(delta: Tensor, threshold: float, name: str) -> Tensor:
    """Singular values less a threshold, down to 0, which minimises |X − Δ|² + 2 · threshold · |X|_*; [m, n]."""
    left, values, right = leading(delta, min(delta.shape), name)
    return ((left * (values - threshold).clamp(min=0)) @ right).to(delta.dtype)


def shared_and_own(deltas: Tensor, penalty: float, steps: int, name: str) -> tuple[Tensor, Tensor]:
    """C [m, n] and Dₖ [K, m, n] that minimise Σₖ |C + Dₖ − Δₖ|² + penalty · |Dₖ|_*, by turns; of [K, m, n]."""
    shared, own = deltas.mean(0), torch.zeros_like(deltas)
    for _ in range(steps):
        own = torch.stack([shrunk(delta - shared, penalty / 2, name) for delta in deltas])
        shared = (deltas - own).mean(0)
    return shared, own


class LoRe(Transform):
    """Low-rank estimation (LoRE-Merging, arXiv:2502.10749): the base is estimated too, from the experts alone.

    For each matrix, min Σₖ |θ̃₀ + δₖ − θₖ|² + μ |δₖ|_*, by turns: δₖ are the singular values of θₖ − θ̃₀ less μ/2, down
    to 0, and θ̃₀ is the mean of θₖ − δₖ. Then θ̃₀ takes the base's place and δₖ that of the deltas. All other tensors
    stay as they are. Averaged, θ̃₀ + (1/K) Σₖ δₖ is the mean of the experts whatever μ: take the sum, at some scale.
    Task vectors over files are loaded.

    Args:
        penalty: μ > 0, on the scale of singular values of the deltas.
        steps: turns; K decompositions each.
        matrices: which tensors are matrices.
    """

    def __init__(self, penalty: float = 0.01, steps: int = 20, matrices: Matrices = TWO_AXES) -> None:
        if penalty <= 0 or steps < 1:
            raise InputError(f"expected penalty above 0 and steps from 1 on in LoRe, got {penalty} and {steps}")
        self.penalty, self.steps, self.matrices = penalty, steps, matrices

    @torch.no_grad()
    def __call__(self, task_vectors: TaskVectors) -> TaskVectors:
        old = task_vectors.load()
        base, own = dict(old.base), {}
        for name in old.rows:
            value = old.base[name]
            if self.matrices.match(name, value.shape):
                deltas = dense(old.deltas[name])
                shared, low = shared_and_own(deltas.flatten(2), self.penalty, self.steps, name)
                base[name] = (value + shared.view(value.shape)).to(value.dtype)
                own[name] = low.view(deltas.shape)
        base |= {alias: base[name] for alias, name in old.tied.items()}

        def change(name: str, deltas: AnyDeltas) -> AnyDeltas:
            return own.get(name, deltas)

        return old.changed(change, base)
