"""The merge that interferes least with what the experts' inputs are taken to be."""

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.rules.adam import adam
from adamerge.rules.base import Stack
from adamerge.rules.matrices import TWO_AXES, Matrices, MatrixRule


def proxies(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """A = Σₖ Gₖ [n, n] and B = Σₖ Δₖ Gₖ [m, n], Gₖ = ΔₖᵀΔₖ / |Δₖ|², of [K, m, n]; experts that are zero have no G."""
    left, right = deltas.new_zeros(deltas.shape[2], deltas.shape[2]), torch.zeros_like(deltas[0])
    for delta in deltas:
        norm = torch.linalg.vector_norm(delta)
        if norm > 0:
            unit = delta / norm
            gram = unit.T @ unit
            left += gram
            right += delta @ gram
    return left, right


def descend(start: Tensor, left: Tensor, right: Tensor, steps: int, lr: float) -> Tensor:
    """Adam on Σₖ |(X − Δₖ) Δₖᵀ|² / |Δₖ|² from X = `start`; the gradient is 2 (X A − B), for A and B of `proxies`."""
    return adam(start, lambda change: 2 * (change @ left - right), steps, lr)


def ridged(start: Tensor, left: Tensor, right: Tensor, ridge: float) -> Tensor:
    """The minimiser of the same plus ρ |X − start|², ρ = ridge · tr(A)/n: start + (B − start A)(A + ρ)⁻¹."""
    regular = left + ridge * left.trace() / len(left) * torch.eye(len(left)).to(left)
    return start + torch.cholesky_solve((right - start @ left).T, torch.linalg.cholesky(regular)).T


class Wudi(MatrixRule):
    """WUDI merging (arXiv:2503.08099): the experts' task vectors stand for their inputs, so that no data are needed.

    The inputs that expert k was trained on lie about in the row space of Δₖ, and the merge X should answer them as the
    expert does: min Σₖ |(X − Δₖ) Δₖᵀ|² / |Δₖ|², from X = Σₖ Δₖ, by some steps of Adam. Stopping early keeps the
    directions that no expert uses much where they were. All other tensors are averaged. Needs no scale.

    With a `ridge`, it is another method: what holds X at Σₖ Δₖ is a penalty instead, and the minimiser is found at
    once. That is RegMean with Gₖ = ΔₖᵀΔₖ / |Δₖ|² in the place of the inputs' Gram matrices.

    Args:
        steps: of Adam.
        lr: its learning rate, about how far an entry moves per step.
        ridge: above 0: no Adam, but the minimiser with the penalty ridge · tr(A)/n · |X − Σₖ Δₖ|², A = Σₖ Gₖ.
        matrices: which tensors are matrices.
    """

    def __init__(
        self, steps: int = 300, lr: float = 1e-5, ridge: float | None = None, matrices: Matrices = TWO_AXES
    ) -> None:
        super().__init__(matrices)
        if steps < 1 or lr <= 0 or (ridge is not None and ridge <= 0):
            raise InputError(f"expected steps, lr and ridge above 0 in Wudi, got {steps}, {lr} and {ridge}")
        self.steps, self.lr, self.ridge = steps, lr, ridge

    def matrix(self, stack: Stack) -> Tensor:
        if self.ridge is None:
            return descend(stack.deltas.sum(0), *proxies(stack.deltas), self.steps, self.lr)
        exact = stack.deltas.double()
        return ridged(exact.sum(0), *proxies(exact), self.ridge)
