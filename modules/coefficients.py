"""Merging coefficients λ: the few numbers that adaptation learns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adamerge import CoefficientTable, InputError, read_coefficients
from adamerge.kinds import block_of

Grain = Literal["model", "block", "tensor"]
#: Where coefficients begin in the field's benchmark of eight CLIP tasks.
USUAL_SCALE = 0.3

Bound = Literal["none", "clamp", "softmax", "sigmoid", "tanh"]


class Coefficients(nn.Module):
    """One coefficient per task and row of tensors: λ = φ(raw), with θ_l = θ₀_l + Σₖ λ_{g(l),k} τ_{l,k}.

    `grain` says which tensors share a row: all of them (task-wise AdaMerging), those of one block, or none
    (layer-wise AdaMerging, arXiv:2310.02575, whose "layer" is one parameter tensor). `bound` is φ: none, clamp to
    [0, 1], softmax over the tasks, sigmoid or tanh. Where clamp cuts a value off, a gradient that would bring it back
    still passes; a plain clamp would freeze the coefficient for good.

    Always in float32 at least, whatever the model's precision: steps of 1e-3 vanish in bfloat16.

    Args:
        grain: what shares a coefficient.
        bound: the map from raw to effective values.
        init: effective values at the start: one number, one per task, a tensor [rows, K], or a `coefficients.json`.
            Default: the usual scale of the suite (0.3), and 1/K under softmax, whose rows sum to one.
    """

    raw: nn.Parameter

    def __init__(
        self, grain: Grain = "tensor", bound: Bound = "none", init: float | list[float] | str | Tensor | None = None
    ) -> None:
        super().__init__()
        self.grain, self.bound, self.init = grain, bound, init
        self.tasks: tuple[str, ...] = ()
        self.rows: tuple[str, ...] = ()
        self.groups: tuple[str, ...] = ()
        self._scale = USUAL_SCALE
        self._fixed: Tensor | None = None

    def bind(
        self,
        rows: Sequence[str],
        tasks: Sequence[str],
        dtype: torch.dtype = torch.float32,
        may_be_empty: bool = False,
        scale: float = USUAL_SCALE,
    ) -> "Coefficients":
        """Create the parameter for these tensors and tasks; called once, by the model that uses the coefficients."""
        if self.groups:
            raise InputError("these coefficients belong to another merged model already; build new ones")
        if not rows and not may_be_empty:
            raise InputError("no tensor differs between base and experts: there is nothing to merge")
        self.rows, self.tasks, self._scale = tuple(rows), tuple(tasks), scale
        group = {
            "model": dict.fromkeys(rows, "model"),
            "block": block_of(rows),
            "tensor": {name: name for name in rows},
        }
        self.group_of = group[self.grain]
        self.groups = tuple(dict.fromkeys(self.group_of.values()))
        effective = self._initial().to(torch.promote_types(torch.float32, dtype))
        self.raw = nn.Parameter(_inverse(self.bound, effective))
        return self

    def check(self, tasks: Sequence[str]) -> None:
        """Raise InputError for a start that these tasks or the bound do not allow; needs no model."""
        if isinstance(self.init, (str, Path)):
            table = read_coefficients(self.init)
            if sorted(table.tasks) != sorted(tasks):
                raise InputError(f"{self.init} is for tasks {list(table.tasks)}, here are {list(tasks)}")
        elif self.init is not None and torch.as_tensor(self.init).ndim < 2:
            Coefficients("model", self.bound, self.init).bind(["model"], tasks)

    def forward(self) -> Tensor:
        """Effective coefficients, [groups, K]."""
        return _bounded(self.bound, self.raw) if self._fixed is None else self._fixed.to(self.raw)

    @contextmanager
    def at(self, values: Tensor | None) -> Iterator[None]:
        """Within the block, the effective coefficients are `values` [groups, K] (`None`: the current ones)."""
        outer, self._fixed = self._fixed, values
        try:
            yield
        finally:
            self._fixed = outer

    def by_tensor(self) -> dict[str, Tensor]:
        """Effective coefficients of every tensor, [K] each; one graph node for all."""
        values = dict(zip(self.groups, self().unbind(0), strict=True))
        return {name: values[self.group_of[name]] for name in self.rows}

    @torch.no_grad()
    def table(self, fingerprints: dict[str, str] | None = None) -> CoefficientTable:
        """The effective values with their names, to save or to apply."""
        rows = {
            name: dict(zip(self.tasks, row.double().cpu().tolist(), strict=True))
            for name, row in self.by_tensor().items()
        }
        return CoefficientTable(rows, fingerprints or {})

    def extra_repr(self) -> str:
        return f"grain={self.grain!r}, bound={self.bound!r}, rows={len(self.groups)}, tasks={len(self.tasks)}"

    def _initial(self) -> Tensor:
        shape = (len(self.groups), len(self.tasks))
        if self.init is None:
            return torch.full(shape, 1 / shape[1] if self.bound == "softmax" else self._scale, dtype=torch.float64)
        if isinstance(self.init, (str, Path)):
            return self._from_table(read_coefficients(self.init))
        given = torch.as_tensor(self.init, dtype=torch.float64)
        try:
            return given.expand(shape).clone()
        except RuntimeError:
            raise InputError(
                f"init has shape {list(given.shape)}; expected one number, {shape[1]} numbers (one per task, in the "
                f"order {list(self.tasks)}), or a tensor of shape {list(shape)}"
            ) from None

    def _from_table(self, table: CoefficientTable) -> Tensor:
        missing = [name for name in self.rows if name not in table.rows]
        if missing or sorted(table.tasks) != sorted(self.tasks):
            raise InputError(
                f"{self.init} does not fit: it is for tasks {list(table.tasks)}, here are {list(self.tasks)}"
                + (f"; it has no row for {missing[0]} and {len(missing) - 1} others" if missing else "")
            )
        members: dict[str, list[Tensor]] = {group: [] for group in self.groups}
        for name in self.rows:
            members[self.group_of[name]].append(table.tensor(name, self.tasks))
        return torch.stack([torch.stack(rows).mean(0) for rows in members.values()])


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


def _bounded(bound: Bound, raw: Tensor) -> Tensor:
    if bound == "clamp":
        clamped: Tensor = _Clamp.apply(raw)
        return clamped
    if bound == "softmax":
        return raw.softmax(1)
    return {"none": lambda x: x, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[bound](raw)


def _inverse(bound: Bound, value: Tensor) -> Tensor:
    """The raw values that give these effective ones; raises where there are none."""
    allowed = {
        "none": ("any number", torch.isfinite(value)),
        "clamp": ("numbers in [0, 1]", (value >= 0) & (value <= 1)),
        "softmax": (
            f"positive numbers that sum to 1 over the tasks, such as 1/K = {1 / value.shape[1]:.4f}",
            (value > 0) & torch.isclose(value.sum(1, keepdim=True), value.new_ones(1), atol=1e-4),
        ),
        "sigmoid": ("numbers in (0, 1)", (value > 0) & (value < 1)),
        "tanh": ("numbers in (-1, 1)", value.abs() < 1),
    }
    words, fits = allowed[bound]
    if not bool(fits.all()):
        raise InputError(
            f"init {value[~fits.expand_as(value)][0].item():g} is not possible under bound {bound!r}: use {words}"
        )
    return {"softmax": torch.log, "sigmoid": torch.logit, "tanh": torch.atanh}.get(bound, torch.clone)(value)
