"""Merging coefficients λ: the few numbers that adaptation learns."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from adamerge import CoefficientTable, InputError, read_coefficients
from adamerge.kinds import block_of
from modules.bounds import CONVEX, Bound, bounded, inverse

Grain = Literal["model", "block", "tensor", "column"]
#: Where coefficients begin in the field's benchmark of eight CLIP tasks.
USUAL_SCALE = 0.3


class Coefficients(nn.Module):
    """One coefficient per task and row: λ = φ(raw), with θ_l = θ₀_l + Σₖ λ_{g(l),k} τ_{l,k}.

    `grain` says what shares a row: all tensors (task-wise AdaMerging), those of one block, each tensor alone
    (layer-wise AdaMerging, arXiv:2310.02575, whose "layer" is one parameter tensor), or each input column of a tensor,
    the second of its axes (arXiv:2410.08371; a vector has one row). `bound` is φ: none, clamp to [0, 1], softmax
    over the tasks, projection on the simplex {λ ≥ 0, Σₖ λₖ = 1}, sigmoid or tanh. Where clamp or the simplex cuts a
    value off, a gradient that would bring it back still passes; else the coefficient would be frozen for good.

    Always in float32 at least, whatever the model's precision: steps of 1e-3 vanish in bfloat16.

    Args:
        grain: what shares a coefficient.
        bound: the map from raw to effective values.
        init: effective values at the start: one number, one per task, a tensor [rows, K], `mean` for 1/K, or a
            `coefficients.json`. Default: the usual scale of the suite (0.3), and 1/K where rows sum to one.
        only: a regular expression; the coefficients of tensors whose names do not contain it stay as they begin.
            Default: all learn.

    Attributes:
        raw: what learns, [rows that learn, K].
        groups: names of what has coefficients: one row, or as many as there are columns.
    """

    raw: nn.Parameter
    start: Tensor
    index: Tensor

    def __init__(
        self,
        grain: Grain = "tensor",
        bound: Bound = "none",
        init: float | list[float] | str | Tensor | None = None,
        only: str | None = None,
    ) -> None:
        super().__init__()
        self.grain, self.bound, self.init, self.only = grain, bound, init, only
        self.tasks: tuple[str, ...] = ()
        self.rows: tuple[str, ...] = ()
        self.groups: tuple[str, ...] = ()
        self.fixed: frozenset[str] = frozenset()
        self.sizes: list[int] = []
        self._scale = USUAL_SCALE
        self._given: Tensor | None = None

    def bind(
        self,
        rows: Sequence[str],
        tasks: Sequence[str],
        dtype: torch.dtype = torch.float32,
        may_be_empty: bool = False,
        scale: float = USUAL_SCALE,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> "Coefficients":
        """Create the parameter for these tensors and tasks; called once, by the model that uses the coefficients.

        `shapes` are those of the tensors, to count their columns.
        """
        if self.groups:
            raise InputError("these coefficients belong to another merged model already; build new ones")
        if not rows and not may_be_empty:
            raise InputError("no tensor differs between base and experts: there is nothing to merge")
        self.rows, self.tasks, self._scale = tuple(rows), tuple(tasks), scale
        shared = {"model": dict.fromkeys(rows, "model"), "block": block_of(rows)}.get(self.grain, {n: n for n in rows})
        learns = {name: self._learns(name) for name in rows}
        if rows and not any(learns.values()):
            raise InputError(f"no tensor matches only={self.only!r}: nothing learns; there is {rows[0]}, for one")
        self.group_of = {name: shared[name] if learns[name] else f"{shared[name]} (fixed)" for name in rows}
        self.groups = tuple(dict.fromkeys(self.group_of.values()))
        self.fixed = frozenset(self.group_of[name] for name in rows if not learns[name])
        columns = shapes if shapes and self.grain == "column" else {}
        widths = {self.group_of[name]: shape[1] for name, shape in columns.items() if len(shape) > 1}
        self.sizes = [widths.get(group, 1) for group in self.groups]
        effective = self._initial().to(torch.promote_types(torch.float32, dtype))
        learned = torch.tensor([group not in self.fixed for group in self.groups], dtype=torch.bool)
        index = learned.repeat_interleave(torch.tensor(self.sizes, dtype=torch.int64)).nonzero().squeeze(1)
        self.raw = nn.Parameter(inverse(self.bound, effective)[index])
        if self.fixed:
            self.register_buffer("start", effective, persistent=False)
            self.register_buffer("index", index, persistent=False)
        return self

    def check(self, tasks: Sequence[str]) -> None:
        """Raise InputError for a start that these tasks or the bound do not allow; needs no model."""
        try:
            re.compile(self.only or "")
        except re.error as error:
            raise InputError(f"only={self.only!r} is no regular expression: {error}") from error
        if self.init is None or self.init == "mean":
            return
        if isinstance(self.init, (str, Path)):
            table = read_coefficients(self.init)
            if sorted(table.tasks) != sorted(tasks):
                raise InputError(f"{self.init} is for tasks {list(table.tasks)}, here are {list(tasks)}")
        elif torch.as_tensor(self.init).ndim < 2:
            Coefficients("model", self.bound, self.init).bind(["model"], tasks)

    def forward(self) -> Tensor:
        """Effective coefficients, [rows, K]."""
        if self._given is not None:
            return self._given.to(self.raw)
        return self.whole(bounded(self.bound, self.raw))

    @torch.no_grad()
    def saturated(self, margin: float = 0.01) -> float:
        """The fraction of effective values within a margin of a bound; 0 where there is none."""
        if self.bound == "none":
            return 0.0
        values, low = self(), -1 if self.bound == "tanh" else 0
        return float(((values <= low + margin) | (values >= 1 - margin)).float().mean())

    def whole(self, values: Tensor) -> Tensor:
        """[rows, K] of these effective values [rows that learn, K] and those that do not learn."""
        return self.start.index_copy(0, self.index, values) if self.fixed else values

    @torch.no_grad()
    def assign(self, values: Tensor) -> None:
        """Take effective values [rows that learn, K]. Raises InputError for values that the bound does not reach."""
        self.raw.copy_(inverse(self.bound, values.to(self.raw)))

    @contextmanager
    def at(self, values: Tensor | None) -> Iterator[None]:
        """Within the block, the effective coefficients are `values` [rows, K] (`None`: the current ones)."""
        outer, self._given = self._given, values
        try:
            yield
        finally:
            self._given = outer

    def by_tensor(self) -> dict[str, Tensor]:
        """Effective coefficients of every tensor, [K], or [J, K] where J > 1 columns have their own."""
        if self.grain == "column":
            parts = [part.squeeze(0) for part in self().split(self.sizes)]
        else:
            parts = list(self().unbind(0))  # one graph node for all
        # What does not learn needs no gradient: the backward pass leaves those tensors out.
        values = {g: part.detach() if g in self.fixed else part for g, part in zip(self.groups, parts, strict=True)}
        return {name: values[self.group_of[name]] for name in self.rows}

    def means(self) -> Tensor:
        """The mean over the columns of every group, [groups, K]; the coefficients themselves where each has one row."""
        values = self().detach()
        return torch.stack([part.mean(0) for part in values.split(self.sizes)]) if self.grain == "column" else values

    @torch.no_grad()
    def table(self, fingerprints: dict[str, str] | None = None) -> CoefficientTable:
        """The effective values with their names, to save or to apply."""
        rows = {
            name: dict(zip(self.tasks, row.double().cpu().movedim(-1, 0).tolist(), strict=True))
            for name, row in self.by_tensor().items()
        }
        return CoefficientTable(rows, fingerprints or {})

    def expert_axes(self) -> dict[str, tuple[int, ...]]:
        """See `modules.Router.expert_axes`."""
        return {"raw": (1,)}

    def extra_repr(self) -> str:
        return f"grain={self.grain!r}, bound={self.bound!r}, rows={sum(self.sizes)}, tasks={len(self.tasks)}"

    def _learns(self, name: str) -> bool:
        return self.only is None or re.search(self.only, name) is not None

    def _initial(self) -> Tensor:
        shape = (sum(self.sizes), len(self.tasks))
        if self.init is None or self.init == "mean":
            mean = self.init == "mean" or self.bound in CONVEX
            return torch.full(shape, 1 / shape[1] if mean else self._scale, dtype=torch.float64)
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
        sizes = dict(zip(self.groups, self.sizes, strict=True))
        for name in self.rows:
            row, size = torch.atleast_2d(table.tensor(name, self.tasks)), sizes[self.group_of[name]]
            if size > 1 and len(row) not in (1, size):
                raise InputError(f"{self.init} has {len(row)} columns for {name}, which has {size} here")
            members[self.group_of[name]].append(row if len(row) == size else row.mean(0).expand(size, -1))
        return torch.cat([torch.stack(rows).mean(0) for rows in members.values()])
