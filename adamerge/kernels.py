"""All weighted sums of a model in one launch, and the gradient of all its coefficients in two (Triton, CUDA).

Tensors stay where they are: kernels find them through tables of addresses, so that neither base, deltas nor gradients
are gathered into one buffer. Sums are in float32, in an order that never changes. `adamerge.ops.weighted_sums` comes
here where it can; the environment's ADAMERGE_KERNELS=0 keeps it on torch's own operations, and so does a device where
the kernels fail.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge.deltas import AnyDeltas
from adamerge.stored import Stored

log = logging.getLogger(__name__)

#: Entries of one tensor that one program takes, and partial sums that one program adds up at a time.
TILE, CHUNK = 2048, 128
#: Merged tensors begin at multiples of so many entries, as those of torch's allocator do.
ALIGN = 128
#: Said outright, since Triton's default is about to change.
_OPTIONS = {"enable_fp_fusion": True}
#: Triton's interpreter runs kernels on the CPU, to test them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def fits(base: Tensor, deltas: AnyDeltas) -> bool:
    """Whether the kernels take these: float32 on a GPU, deltas in float32 or bfloat16."""
    values = _values(deltas)
    at_hand = values is not None and values.is_contiguous() and base.is_contiguous() and values.numel() > 0
    there = values is not None and base.device == values.device == deltas.device
    return bool(at_hand and there and (base.is_cuda or INTERPRETED) and base.dtype == deltas.dtype == torch.float32)


@cache
def work(device: torch.device) -> bool:
    """Whether they give on this device what plain sums give: tried once, with a few numbers."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            base = torch.linspace(-1, 1, TILE + 2, device=device)
            deltas = torch.stack([base.square(), base.cos(), base.flip(0)])
            rows = torch.tensor([[0.5, -2.0, 0.25]], device=device, requires_grad=True)
            (merged,) = sums(rows, [base], [deltas])
            (grad,) = torch.autograd.grad(merged.square().sum(), rows)
            plain = base + (rows.T * deltas).sum(0)
            expected = torch.autograd.grad(plain.square().sum(), rows)[0]
        wrong = (
            None if torch.allclose(merged, plain, 1e-4, 1e-4) and torch.allclose(grad, expected, 1e-3) else "wrong sums"
        )
    except Exception as error:  # whatever a compiler or a driver raises
        wrong = f"{type(error).__name__}: {error}".splitlines()[0]
    if wrong:
        log.warning(
            "merging on %s takes torch's own operations, since the kernels do not work there (%s)", device, wrong
        )
    return not wrong


def sums(coefficients: Tensor, bases: Sequence[Tensor], deltas: Sequence[AnyDeltas]) -> tuple[Tensor, ...]:
    """As `adamerge.ops.weighted_sums`, for coefficients [R, K] and R tensors that fit."""
    merged: tuple[Tensor, ...] = _Sums.apply(coefficients, bases, deltas)
    return merged


@triton.jit
def _delta(address, half, place, inside):
    if half:
        value = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + place, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(address.to(tl.pointer_type(tl.float32)) + place, mask=inside, other=0.0)
    return value


@triton.jit
def _merge(
    out,
    starts,
    bases,
    coefficients,
    deltas,
    halves,
    sizes,
    owners,
    offsets,
    experts: tl.constexpr,
    entries: tl.constexpr,
):
    """One tile of one merged tensor: base + Σₖ λₖ τₖ."""
    tile = tl.program_id(0)
    owner = tl.load(owners + tile)
    size, half, address = tl.load(sizes + owner), tl.load(halves + owner), tl.load(deltas + owner)
    place = tl.load(offsets + tile) + tl.arange(0, entries)
    inside = place < size
    total = tl.load(tl.load(bases + owner).to(tl.pointer_type(tl.float32)) + place, mask=inside, other=0.0)
    for k in range(experts):
        total += tl.load(coefficients + owner * experts + k) * _delta(address, half, place + k * size, inside)
    tl.store(out + tl.load(starts + owner) + place, total, mask=inside)


@triton.jit
def _contract(partial, grads, deltas, halves, sizes, owners, offsets, experts: tl.constexpr, entries: tl.constexpr):
    """The products of one tile of a gradient with the same tile of every τₖ; a gradient that is absent is zero."""
    tile = tl.program_id(0)
    owner = tl.load(owners + tile)
    size, half, address = tl.load(sizes + owner), tl.load(halves + owner), tl.load(deltas + owner)
    source = tl.load(grads + owner)
    place = tl.load(offsets + tile) + tl.arange(0, entries)
    inside = place < tl.where(source == 0, 0, size)
    grad = tl.load(source.to(tl.pointer_type(tl.float32)) + place, mask=inside, other=0.0)
    for k in range(experts):
        tl.store(partial + tile * experts + k, tl.sum(grad * _delta(address, half, place + k * size, inside)))


@triton.jit
def _add(out, partial, firsts, experts: tl.constexpr, chunk: tl.constexpr):
    """The sum of all tiles of one tensor, for one expert."""
    owner, k = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(firsts + owner), tl.load(firsts + owner + 1)
    total = tl.zeros([chunk], dtype=tl.float32)
    for start in range(first, last, chunk):
        tile = start + tl.arange(0, chunk)
        total += tl.load(partial + tile * experts + k, mask=tile < last, other=0.0)
    tl.store(out + owner * experts + k, tl.sum(total))


@dataclass(frozen=True)
class _Tables:
    """Where R tensors are and how they are cut into T tiles; [R], but for `owners`, `offsets` [T], `firsts` [R + 1]."""

    rooms: list[int]
    bases: Tensor
    deltas: Tensor
    halves: Tensor
    sizes: Tensor
    starts: Tensor
    owners: Tensor
    offsets: Tensor
    firsts: Tensor


@lru_cache(maxsize=4)
def _tables(places: tuple[tuple[int, int, bool, int], ...], device: torch.device) -> _Tables:
    """The tables of tensors at these addresses: of base and deltas, whether in half precision, and sizes."""
    bases, deltas, halves, sizes = (torch.tensor(column) for column in zip(*places, strict=True))
    tiles = -(-sizes // TILE)
    firsts = torch.cat([torch.zeros(1, dtype=torch.int64), tiles.cumsum(0)])
    owners = torch.arange(len(sizes)).repeat_interleave(tiles)
    offsets = (torch.arange(len(owners)) - firsts[owners]) * TILE
    rooms = -(-sizes // ALIGN) * ALIGN
    starts = rooms.cumsum(0) - rooms
    columns = (bases, deltas, halves.to(torch.int32), sizes, starts, owners, offsets, firsts)
    return _Tables(rooms.tolist(), *(column.to(device) for column in columns))


def _values(deltas: AnyDeltas) -> Tensor | None:
    """The numbers that a kernel reads; none of other forms."""
    if isinstance(deltas, Tensor):
        return deltas
    half = isinstance(deltas, Stored) and deltas.values.dtype in (torch.bfloat16, torch.float32)
    return deltas.values if half and isinstance(deltas, Stored) else None


class _Sums(torch.autograd.Function):
    """As `adamerge.ops._WeightedSum`, for all tensors at once."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, bases: Sequence[Tensor], deltas: Sequence[AnyDeltas]
    ) -> tuple[Tensor, ...]:
        values = [value for delta in deltas if (value := _values(delta)) is not None]
        places = tuple(
            (base.data_ptr(), value.data_ptr(), value.dtype == torch.bfloat16, base.numel())
            for base, value in zip(bases, values, strict=True)
        )
        tables = _tables(places, bases[0].device)
        ctx.tables, ctx.held, ctx.dtype, ctx.shape = tables, values, coefficients.dtype, coefficients.shape
        rows, out = coefficients.float().contiguous(), bases[0].new_empty(sum(tables.rooms))
        _merge[(len(tables.owners),)](
            out, tables.starts, tables.bases, rows, tables.deltas, tables.halves, tables.sizes, tables.owners,
            tables.offsets, experts=rows.shape[1], entries=TILE, **_OPTIONS,
        )  # fmt: skip
        parts = out.split(tables.rooms)
        return tuple(part[: base.numel()].view(base.shape) for part, base in zip(parts, bases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tables, (rows, experts) = ctx.tables, ctx.shape
        held = [None if grad is None else grad.float().contiguous() for grad in grads]
        places = torch.tensor([0 if grad is None else grad.data_ptr() for grad in held]).to(tables.sizes.device)
        partial = torch.empty(len(tables.owners), experts, device=tables.sizes.device)
        result = torch.empty(rows, experts, device=tables.sizes.device)
        _contract[(len(tables.owners),)](
            partial, places, tables.deltas, tables.halves, tables.sizes, tables.owners, tables.offsets, experts=experts,
            entries=TILE, **_OPTIONS,
        )  # fmt: skip
        _add[(rows, experts)](result, partial, tables.firsts, experts=experts, chunk=CHUNK, **_OPTIONS)
        return result.to(ctx.dtype), None, None
