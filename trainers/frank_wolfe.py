"""The Frank-Wolfe method for coefficients on a simplex."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adamerge import InputError


class FrankWolfe(torch.optim.Optimizer):
    """Every row of coefficients goes a part of the way to one expert (FW-Merging, arXiv:2503.12649).

    The merge stays in the convex hull of the experts, conv{θ₀ + τₖ}. Of its corners, the linear minimisation oracle
    picks the one that the loss falls towards most steeply, argmin_k ⟨∇ℓ, τₖ⟩; as ∂L/∂λₖ = ⟨∇ℓ, τₖ⟩, that is the
    smallest entry s of the coefficients' gradient. Then

        λ ← (1 − γ_t) λ + γ_t e_s,    γ_t = 2 / (t + 2).

    A row is what shares coefficients: a tensor (layer-wise oracle), the model (task-wise), ... It stays where no corner
    is better, ⟨∂L/∂λ, λ − e_s⟩ ≤ 0. The first step, of size one, goes all the way: the start decides where its gradient
    is taken and no more. There is no learning rate.

    Args:
        params: rows [R, K] of coefficients with bound `simplex`, or without a bound, that sum to one.
        step: a constant γ in (0, 1] instead of γ_t.
        base: the base is a corner too, λ = 0, and rows may sum to less than one; for bounds `clamp` and `none`.

    Raises:
        InputError: for parameters that are no points of the hull, such as those of other parts.
    """

    def __init__(self, params: Any, step: float | None = None, base: bool = False) -> None:
        if step is not None and not 0 < step <= 1:
            raise InputError(f"FrankWolfe takes a step in (0, 1], got {step}")
        super().__init__(params, {"gamma": step, "base": base})
        for group in self.param_groups:
            for rows in group["params"]:
                _check(rows.detach(), base)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every row."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for rows in group["params"]:
                if rows.grad is None:
                    continue
                done = self.state[rows].get("step", 0)
                gamma = group["gamma"] or 2 / (done + 2)
                way = _corners(rows.grad, group["base"]) - rows
                better = (rows.grad * way).sum(1, keepdim=True) < 0
                rows.add_(way.mul_(better), alpha=gamma)
                self.state[rows]["step"] = done + 1
        return loss


def _corners(grad: Tensor, base: bool) -> Tensor:
    """[R, K] the corner that each row goes to: one-hot, or zeros for the base."""
    lowest, best = grad.min(1, keepdim=True)
    corners = torch.zeros_like(grad).scatter_(1, best, 1)
    return corners.masked_fill_(lowest >= 0, 0) if base else corners


def _check(rows: Tensor, base: bool) -> None:
    sums = rows.sum(1) if rows.dim() == 2 else rows.new_zeros(1)
    inside = rows.dim() == 2 and bool((rows >= -1e-4).all()) and bool((sums <= 1 + 1e-4).all())
    if not inside or (not base and bool((sums < 1 - 1e-4).any())):
        raise InputError(
            "FrankWolfe moves coefficients within the hull of the experts: give them bound simplex, and let nothing "
            "else learn" + (" (with base: bound clamp, and a start of at most 1/K)" if base else "")
        )
