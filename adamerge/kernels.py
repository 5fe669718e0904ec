"""All weighted sums of a model in one launch, and the gradient of all its coefficients in two (Triton, CUDA).

Tensors stay where they are: kernels find them through a table of addresses, so that neither base, deltas nor gradients
are gathered into one buffer, and the form of deltas may differ from tensor to tensor. Sums are in float32, in an order
that never changes. `adamerge.ops.weighted_sums` comes here where it can; the environment's ADAMERGE_KERNELS=0 keeps it
on torch's own operations, and so does a device where the kernels fail.
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
from adamerge.deltas import dense as whole
from adamerge.stored import SHARE, Stored

log = logging.getLogger(__name__)

#: Entries of one tensor that one program takes, some shares of them; partial sums that one program adds up at a time.
TILE, CHUNK = 16 * SHARE, 128
#: Merged tensors begin at multiples of so many entries, as those of torch's allocator do.
ALIGN = 128
#: Forms of values, as the table has them.
_FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_HALF, _BYTES, _SHARE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(SHARE)
#: Bytes that a thread reads at once in 8 bits, and at a multiple of which these begin.
_WIDE = tl.constexpr(16)
#: Said outright, since Triton's default is about to change.
_OPTIONS = {"enable_fp_fusion": True}
#: Triton's interpreter runs kernels on the CPU, to test them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def fits(base: Tensor | None, deltas: AnyDeltas) -> bool:
    """Whether the kernels take these: float32 on a GPU, deltas in float32, in bfloat16 or in 8 bits."""
    values, *scales = _parts(deltas) or (None,)
    there = INTERPRETED or deltas.device.type == "cuda"
    if values is None or values.dtype not in _FORMS or not values.numel() or not there:
        return False
    bases = [] if base is None else [base]
    alike = all(part.shape == deltas.shape[1:] for part in bases)  # a kernel does not broadcast
    at_hand = all(part.is_contiguous() and part.device == deltas.device for part in (*bases, values, *scales))
    wide = not scales or values.data_ptr() % _WIDE.value == 0
    floats = {part.dtype for part in (*bases, deltas, *scales)} == {torch.float32}
    return alike and at_hand and wide and floats


@cache
def work(device: torch.device) -> bool:
    """Whether they give on this device what plain sums give: tried once, with a few numbers."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            base = torch.linspace(-1, 1, TILE + 2, dtype=torch.float32, device=device)
            dense = torch.stack([base.square(), base.cos(), base.flip(0)])
            deltas: list[AnyDeltas] = [dense, *(Stored.from_dense(dense, form) for form in _FORMS)]
            rows = base.new_tensor([[0.5, -2.0, 0.25]] * len(deltas)).requires_grad_()
            merged = sums(rows, [base] * len(deltas), deltas)
            # Nothing is saved for the backward pass: hooks of a caller, such as checkpointing's, do not see the trial.
            (grad,) = torch.autograd.grad(merged, rows, [base.exp()] * len(deltas))
        known = torch.stack([whole(delta) for delta in deltas])
        plain, expected = base + (rows.detach().unsqueeze(2) * known).sum(1), (base.exp() * known).sum(2)
        right = torch.allclose(torch.stack(merged), plain, 1e-4, 1e-4) and torch.allclose(grad, expected, 1e-3)
        wrong = None if right else "wrong sums"
    except Exception as error:  # whatever a compiler or a driver raises
        wrong = f"{type(error).__name__}: {error}".splitlines()[0]
    if wrong:
        log.warning(
            "merging on %s takes torch's own operations, since the kernels do not work there (%s)", device, wrong
        )
    return not wrong


def sums(coefficients: Tensor, bases: Sequence[Tensor | None], deltas: Sequence[AnyDeltas]) -> tuple[Tensor, ...]:
    """As `adamerge.ops.weighted_sums`, for coefficients [R, K] and R tensors that fit."""
    merged: tuple[Tensor, ...] = _Sums.apply(coefficients, bases, deltas)
    return merged


@triton.jit
def _row(table, owner):
    """Of one tensor: addresses of base, values and scales, form, entries, where the merged one starts, first tile."""
    row = table + owner * 7
    base, values, scales, form = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return base, values, scales, form, tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)


@triton.jit
def _floats(values, form, place, inside):
    """Entries of one expert, [TILE]."""
    if form == _HALF:
        value = tl.load(values.to(tl.pointer_type(tl.bfloat16)) + place, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(values.to(tl.pointer_type(tl.float32)) + place, mask=inside, other=0.0)
    return value


@triton.jit
def _shares(values, scales, share, inside):
    """These shares as they are stored, [S, SHARE], and their scales [S]."""
    # A share is a row: a thread loads 16 bytes at once and one scale for them. With two loads for every entry instead,
    # Hopper's load units would by estimate take as long as its memory.
    place = share[:, None] * _SHARE + tl.arange(0, _SHARE)[None, :]
    wide = tl.multiple_of(values.to(tl.pointer_type(tl.int8)), _WIDE)
    value = tl.load(wide + place, mask=inside[:, None], other=0).to(tl.float32)
    return value, tl.load(scales.to(tl.pointer_type(tl.float32)) + share, mask=inside, other=0.0)


@triton.jit
def _merge(out, table, owners, coefficients, experts: tl.constexpr, entries: tl.constexpr):
    """One tile of one merged tensor: base + Σₖ λₖ τₖ; a base that is absent is zero."""
    owner = tl.load(owners + tl.program_id(0))
    base, values, scales, form, size, start, first = _row(table, owner)
    tile = tl.program_id(0) - first
    place = tile * entries + tl.arange(0, entries)
    inside, rows = place < size, coefficients + owner * experts
    there = tl.where(base == 0, 0, size)
    total = tl.load(base.to(tl.pointer_type(tl.float32)) + place, mask=place < there, other=0.0)
    if form == _BYTES:
        share = tile * (entries // _SHARE) + tl.arange(0, entries // _SHARE)
        count = tl.cdiv(size, _SHARE)
        added = tl.zeros([entries // _SHARE, _SHARE], dtype=tl.float32)
        for k in range(experts):
            value, scale = _shares(values, scales, k * count + share, share < count)
            added += (tl.load(rows + k) * scale)[:, None] * value
        total += added.reshape(entries)
    else:
        for k in range(experts):
            total += tl.load(rows + k) * _floats(values, form, place + k * size, inside)
    tl.store(out + start + place, total, mask=inside)


@triton.jit
def _contract(partial, grads, table, owners, experts: tl.constexpr, entries: tl.constexpr):
    """The products of one tile of a gradient with the same tile of every τₖ; a gradient that is absent is zero."""
    owner = tl.load(owners + tl.program_id(0))
    _, values, scales, form, size, _, first = _row(table, owner)
    source = tl.load(grads + owner)
    there, tile = tl.where(source == 0, 0, size), tl.program_id(0) - first
    place = tile * entries + tl.arange(0, entries)
    inside, products = place < there, partial + tl.program_id(0) * experts
    grad = tl.load(source.to(tl.pointer_type(tl.float32)) + place, mask=inside, other=0.0)
    if form == _BYTES:
        share = tile * (entries // _SHARE) + tl.arange(0, entries // _SHARE)
        count = tl.cdiv(size, _SHARE)
        shared = grad.reshape(entries // _SHARE, _SHARE)
        for k in range(experts):
            value, scale = _shares(values, scales, k * count + share, share * _SHARE < there)
            tl.store(products + k, tl.sum(scale * tl.sum(shared * value, 1)))
    else:
        for k in range(experts):
            tl.store(products + k, tl.sum(grad * _floats(values, form, place + k * size, inside)))


@triton.jit
def _add(out, partial, table, experts: tl.constexpr, entries: tl.constexpr, chunk: tl.constexpr):
    """The sum of all tiles of one tensor, for one expert."""
    owner, k = tl.program_id(0), tl.program_id(1)
    _, _, _, _, size, _, first = _row(table, owner)
    last = first + tl.cdiv(size, entries)
    total = tl.zeros([chunk], dtype=tl.float32)
    for start in range(first, last, chunk):
        tile = start + tl.arange(0, chunk)
        total += tl.load(partial + tile * experts + k, mask=tile < last, other=0.0)
    tl.store(out + owner * experts + k, tl.sum(total))


@dataclass(frozen=True)
class _Tables:
    """Where R tensors are and how they are cut into T tiles.

    Attributes:
        rooms: entries from one merged tensor to the next, R of them.
        rows: what `_row` reads, [R, 7].
        owners: the tensor of every tile, [T].
    """

    rooms: list[int]
    rows: Tensor
    owners: Tensor


@lru_cache(maxsize=8)
def _tables(places: tuple[tuple[int, ...], ...], device: torch.device) -> _Tables:
    """The tables of tensors of which addresses (of base, values and scales), forms and sizes are known."""
    known = torch.tensor(places)
    tiles, rooms = -(-known[:, -1] // TILE), -(-known[:, -1] // ALIGN) * ALIGN
    starts, firsts = rooms.cumsum(0) - rooms, tiles.cumsum(0) - tiles
    owners = torch.arange(len(known)).repeat_interleave(tiles)
    rows = torch.cat([known, torch.stack([starts, firsts], 1)], 1)
    return _Tables(rooms.tolist(), rows.to(device), owners.to(device))


def _parts(deltas: AnyDeltas) -> tuple[Tensor, ...]:
    """The values that a kernel reads and, in 8 bits, their scales; nothing of other forms."""
    if isinstance(deltas, Stored):
        return (deltas.values,) if deltas.scales is None else (deltas.values, deltas.scales)
    return (deltas,) if isinstance(deltas, Tensor) else ()


def _place(base: Tensor | None, size: int, values: Tensor, scales: Tensor | None = None) -> tuple[int, ...]:
    """Addresses, 0 of what is not there, form and entries of one tensor."""
    addresses = [0 if part is None else part.data_ptr() for part in (base, values, scales)]
    return *addresses, _FORMS[values.dtype], size


class _Sums(torch.autograd.Function):
    """As `adamerge.ops._WeightedSum`, for all tensors at once."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, bases: Sequence[Tensor | None], deltas: Sequence[AnyDeltas]
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # what the loss does not depend on costs nothing
        parts, shapes = [_parts(delta) for delta in deltas], [delta.shape[1:] for delta in deltas]
        known = zip(bases, shapes, parts, strict=True)
        tables = _tables(tuple(_place(base, shape.numel(), *held) for base, shape, held in known), deltas[0].device)
        ctx.tables, ctx.held, ctx.dtype, ctx.shape = tables, parts, coefficients.dtype, coefficients.shape
        rows = coefficients.float().contiguous()
        out = rows.new_empty(sum(tables.rooms))
        with torch.cuda.device_of(out):
            _merge[(len(tables.owners),)](
                out, tables.rows, tables.owners, rows, experts=rows.shape[1], entries=TILE, **_OPTIONS
            )
        rooms = zip(out.split(tables.rooms), shapes, strict=True)
        return tuple(room[: shape.numel()].view(shape) for room, shape in rooms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tables, (rows, experts) = ctx.tables, ctx.shape
        held = [None if grad is None else grad.float().contiguous() for grad in grads]
        places = torch.tensor([0 if grad is None else grad.data_ptr() for grad in held]).to(tables.rows.device)
        partial = torch.empty(len(tables.owners), experts, dtype=torch.float32, device=tables.rows.device)
        result = partial.new_empty(rows, experts)
        with torch.cuda.device_of(result):
            _contract[(len(tables.owners),)](
                partial, places, tables.rows, tables.owners, experts=experts, entries=TILE, **_OPTIONS
            )
            _add[(rows, experts)](result, partial, tables.rows, experts=experts, entries=TILE, chunk=CHUNK, **_OPTIONS)
        return result.to(ctx.dtype), None, None
