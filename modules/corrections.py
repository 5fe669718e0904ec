"""Corrections: what a task adds to the merged model for itself alone. Each is the identity at the start."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adamerge import InputError
from modules.blocks import per_task
from modules.merged import MergedModel


class Correction(nn.Module, ABC):
    """Task-specific parameters between the merged backbone and the heads."""

    #: Whether it works inside the backbone, so that features change when it learns.
    inside: bool = False

    @abstractmethod
    def bind(
        self, merged: MergedModel, features: int, sample: Tensor, tasks: Sequence[str] | None = None
    ) -> "Correction":
        """Create the parameters for every task and take the place in a merged model.

        Args:
            merged: the model to correct.
            features: D, the size of its output.
            sample: an image [1, ...], to learn the shapes inside the model.
            tasks: default: one per task vector.
        """

    def features(self, z: Tensor, task: str) -> Tensor:
        """[B, D] features of one task's images, corrected."""
        return z


class Residual(nn.Module):
    """x − U relu(D x) with D [r, d] and U [d, r] = 0 at the start."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1) if x.ndim == 4 else x  # [B, C, H, W] -> [B, H, W, C]
        change: Tensor = self.up(torch.relu(self.down(rows)))
        return x - (change.movedim(-1, 1) if x.ndim == 4 else change)


class Surgery(Correction):
    """Representation Surgery (arXiv:2402.02705): ẑ = z − Uₜ relu(Dₜ z), a rank-r residual on the features of task t.

    With `blocks`, version 2 (arXiv:2410.14389): the same form on all tokens after every residual block as well.
    Trained by the distance to the expert's features (`RepresentationL1`).

    Args:
        rank: r.
        blocks: correct the output of every block too.
    """

    def __init__(self, rank: int = 16, blocks: bool = False) -> None:
        super().__init__()
        self.rank, self.blocks, self.inside = rank, blocks, blocks
        self.final = nn.ModuleDict()
        self.inner = nn.ModuleDict()

    def bind(self, merged: MergedModel, features: int, sample: Tensor, tasks: Sequence[str] | None = None) -> "Surgery":
        tasks = merged.tasks if tasks is None else tasks
        dtype = torch.promote_types(torch.float32, merged.coefficients.raw.dtype)
        self.final.update({task: Residual(features, self.rank) for task in tasks})
        if self.blocks:
            with torch.no_grad(), merged.of({tasks[0]: 1}), merged.blocks.recording() as outputs:
                merged(sample)
            self._place = {name: number for number, name in enumerate(outputs)}
            sizes = [output.shape[1] for output in outputs.values()]
            self.inner.update({task: nn.ModuleList(Residual(size, self.rank) for size in sizes) for task in tasks})
            merged.blocks.correct = self._block
        self.to(device=sample.device, dtype=dtype)
        return self

    def features(self, z: Tensor, task: str) -> Tensor:
        return cast(Tensor, self.final[task](z))

    def _block(self, x: Tensor, block: str, task: str) -> Tensor:
        return cast(Tensor, cast(nn.ModuleList, self.inner[task])[self._place[block]](x))


class TaskBlock(Correction):
    """One block of the backbone that every task has for itself (Model Tinting, arXiv:2412.19098): θ_block + δₜ.

    δₜ is zero at the start and added to whatever the merge gives. Layers that are routed stay as they are.

    Args:
        block: which residual block, counted as in Python; default: the last.
    """

    inside = True

    def __init__(self, block: int = -1) -> None:
        super().__init__()
        self.block = block
        self.deltas = nn.ModuleDict()
        self._running = False

    def bind(
        self, merged: MergedModel, features: int, sample: Tensor, tasks: Sequence[str] | None = None
    ) -> "TaskBlock":
        stack = list(merged.blocks.modules.items())
        if not -len(stack) <= self.block < len(stack):
            raise InputError(f"there is no block {self.block}: the backbone has {len(stack)}")
        name, module = stack[self.block]
        routed = merged.routing.layers if merged.routing else frozenset()
        own = {n: p for n, p in module.named_parameters() if f"{name}.{n}".rpartition(".")[0] not in routed}
        if not own:
            raise InputError(f"every layer of block {name} is routed: nothing is left for a task to change")
        self._names = tuple(own)
        for task in merged.tasks if tasks is None else tasks:
            self.deltas[task] = nn.ParameterList(torch.zeros_like(p) for p in own.values())
        self.requires_grad_(True)
        self._original = module.forward
        this = cast(MergedModel, weakref.proxy(merged))
        module.forward = partial(self._forward, this, module)
        return self

    def _forward(self, merged: MergedModel, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        segments = merged.segments
        if self._running or segments is None:
            return self._original(x, *args, **kwargs)
        weights = dict(module.named_parameters())

        def run(part: Tensor, task: str) -> Tensor:
            changed = {n: weights[n] + d for n, d in zip(self._names, self._task(task), strict=True)}
            with merged.routing.of_task(task, segments) if merged.routing else nullcontext():
                output = functional_call(module, changed, (part, *args), kwargs)
            self._tuple = isinstance(output, tuple)
            return cast(Tensor, output[0] if self._tuple else output)

        with self._inside():
            y = per_task(x, segments, run)
        return (y,) if self._tuple else y

    def _task(self, task: str) -> nn.ParameterList:
        return cast(nn.ParameterList, self.deltas[task])

    @contextmanager
    def _inside(self) -> Iterator[None]:
        self._running = True
        try:
            yield
        finally:
            self._running = False
