"""Bounds φ: the maps from the numbers that an optimiser moves to coefficients that lie where they should."""

from typing import Any, Literal

import torch
from torch import Tensor

from adamerge import InputError

Bound = Literal["none", "clamp", "softmax", "simplex", "sigmoid", "tanh"]

#: The bounds under which the coefficients of a row sum to one.
CONVEX = ("softmax", "simplex")


class _Clamp(torch.autograd.Function):
    """Clamp to [0, 1]; outside, only a gradient whose descent leads back inside passes."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor) -> Tensor:
        ctx.save_for_backward(raw)
        return raw.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (raw,) = ctx.saved_tensors
        stuck = ((raw < 0) & (grad > 0)) | ((raw > 1) & (grad < 0))
        return grad.masked_fill(stuck, 0)


class _Simplex(torch.autograd.Function):
    """Projection of rows on the simplex. Its gradient is that of the face which the projection lies on, g − mean g.

    Where a coefficient is cut off, only a gradient whose descent brings it back passes: at a corner all others are cut
    off, and nothing would ever leave it.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor) -> Tensor:
        value = project(raw)
        ctx.save_for_backward(value > 0)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        along = grad - torch.where(kept, grad, 0).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
        return along.masked_fill(~kept & (along > 0), 0)


def project(rows: Tensor) -> Tensor:
    """The nearest point of {λ ≥ 0, Σₖ λₖ = 1} to every row of [R, K]: max(row − t, 0) (Duchi et al., 2008).

    t = (Σ of the ρ largest − 1) / ρ, for the largest ρ whose ρ-th largest value is above it.
    """
    largest = rows.sort(1, descending=True).values
    count = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    thresholds = (largest.cumsum(1) - 1) / count
    last = (largest > thresholds).sum(1, keepdim=True) - 1
    return (rows - thresholds.gather(1, last)).clamp(min=0)


def bounded(bound: Bound, raw: Tensor) -> Tensor:
    """φ of rows [R, K]."""
    if bound in ("clamp", "simplex"):
        value: Tensor = (_Clamp if bound == "clamp" else _Simplex).apply(raw)
        return value
    if bound == "softmax":
        return raw.softmax(1)
    return {"none": lambda x: x, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[bound](raw)


def inverse(bound: Bound, value: Tensor) -> Tensor:
    """Rows [R, K] with φ(row) = value. Raises InputError where there are none."""
    sums_to_one = torch.isclose(value.sum(1, keepdim=True), value.new_ones(1), atol=1e-4)
    mean = f"numbers that sum to 1 over the tasks, such as 1/K = {1 / value.shape[1]:.4f}"
    allowed = {
        "none": ("any number", torch.isfinite(value)),
        "clamp": ("numbers in [0, 1]", (value >= 0) & (value <= 1)),
        "softmax": (f"positive {mean}", (value > 0) & sums_to_one),
        "simplex": (f"{mean}, none of them negative", (value >= 0) & sums_to_one),
        "sigmoid": ("numbers in (0, 1)", (value > 0) & (value < 1)),
        "tanh": ("numbers in (-1, 1)", value.abs() < 1),
    }
    words, fits = allowed[bound]
    if not bool(fits.all()):
        raise InputError(f"init {value[~fits][0].item():g} is not possible under bound {bound!r}: use {words}")
    return {"softmax": torch.log, "sigmoid": torch.logit, "tanh": torch.atanh}.get(bound, torch.clone)(value)
