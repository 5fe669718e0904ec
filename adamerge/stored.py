"""Deltas in fewer bits, or away from where they are used: in host memory, on disk, shared out over processes."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from adamerge.deltas import Deltas
from adamerge.errors import InputError

#: Entries that share a scale in 8 bits.
SHARE = 128
#: Entries of all experts that are decoded at a time: on a CPU they stay in its cache, to a GPU they make one transfer.
CACHE, TRANSFER = 2**18, 2**25

Parts = tuple[Tensor | None, ...]


class Stored(Deltas):
    """τₖ in bfloat16 or 8 bits, decoded block by block where it is used; [K, *shape] in full never exists.

    τ = v, or τ = s ⊙ v with one scale for every `SHARE` entries of an expert. Sums are in the dtype of `like`.

    Args:
        values: v, [K, n] in a floating dtype, or in int8 with n rounded up to a multiple of `SHARE`.
        shape: [K, *shape], of n elements each.
        scales: s, [K, ⌈n / SHARE⌉], for values in int8 alone.
        like: an empty tensor of the dtype in which, and on the device on which, deltas are decoded and sums computed;
            default: float32, where the values are.
        stays: whether the values stay where they are when a model is moved; else they go along.
    """

    def __init__(
        self,
        values: Tensor,
        shape: torch.Size,
        scales: Tensor | None = None,
        like: Tensor | None = None,
        stays: bool = False,
    ) -> None:
        self.shape, self.values, self.scales, self.stays = torch.Size(shape), values, scales, stays
        self.like = torch.empty(0, device=values.device) if like is None else like
        tasks, self._count = self.shape[0], math.prod(self.shape[1:])
        shares = -(-self._count // SHARE)
        wanted = [(tasks, self._count)] if scales is None else [(tasks, shares * SHARE), (tasks, shares)]
        held = [tuple(part.shape) for part in (values, scales) if part is not None]
        if held != wanted or (values.dtype == torch.int8) != (scales is not None):
            raise InputError(f"{values.dtype} values of shapes {held} do not make deltas of shape {list(self.shape)}")

    @classmethod
    def from_dense(cls, deltas: Tensor, dtype: torch.dtype) -> "Stored":
        """Rounded to the nearest number of a floating dtype, or of 255 from −m to m, m the largest of each share."""
        flat = deltas.unsqueeze(-1).flatten(1)
        if dtype != torch.int8:
            return cls(flat.to(dtype), deltas.shape, None, deltas.new_empty(0))
        shares = torch.nn.functional.pad(flat, (0, -flat.shape[1] % SHARE)).unflatten(1, (-1, SHARE))
        scales = shares.abs().amax(2) / 127
        values = (shares / scales.clamp_min(torch.finfo(scales.dtype).tiny).unsqueeze(2)).round_().to(torch.int8)
        return cls(values.flatten(1), deltas.shape, scales, deltas.new_empty(0))

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def weighted(self, coefficients: Tensor) -> Tensor:
        rows = torch.atleast_2d(coefficients).to(self.dtype)
        total = rows.new_empty(len(rows), self._count)
        for place, block in self._blocks():
            torch.mm(rows, block, out=total[:, place])
        return total.view((*coefficients.shape[:-1], *self.shape[1:]))

    def inner(self, grad: Tensor) -> Tensor:
        flat = grad.to(self.dtype).reshape(grad.shape[0] if self._grouped(grad) else 1, self._count)
        products = flat.new_zeros(len(flat), len(self))
        for place, block in self._blocks():
            products.addmm_(flat[:, place], block.t())
        return products if self._grouped(grad) else products[0]

    def __getitem__(self, k: int) -> Tensor:
        delta, own = torch.empty(1, self._count, dtype=self.dtype, device=self.device), range(len(self))[k]
        for place, block in self._blocks(slice(own, own + 1)):
            delta[:, place] = block
        return delta.view(self.shape[1:])

    def any(self) -> bool:
        return bool(self.values.any())

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Stored":
        like = fn(self.like)
        return self._moved((lambda part: part) if self.stays else (lambda part: part.to(like.device)), like, self.stays)

    def kept(self, move: Callable[[Tensor], Tensor]) -> "Stored":
        """The same with the values moved to where they stay."""
        return self._moved(move, self.like, True)

    def _moved(self, move: Callable[[Tensor], Tensor], like: Tensor, stays: bool) -> "Stored":
        scales = None if self.scales is None else move(self.scales)
        return Stored(move(self.values), self.shape, scales, like, stays)

    def _blocks(self, tasks: slice = slice(None)) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive entries of all experts, [K, m], where and as they are needed; each is gone with the next."""
        experts = len(range(*tasks.indices(len(self))))
        size = max(1, (CACHE if self.device.type == "cpu" else TRANSFER) // experts // SHARE) * SHARE
        places = [slice(start, min(start + size, self._count)) for start in range(0, self._count, size)]
        buffer = torch.empty(experts, min(size, -(-self._count // SHARE) * SHARE), dtype=self.dtype, device=self.device)
        for place, (values, scales) in zip(places, ahead(map(self._part(tasks), places), self.device), strict=True):
            assert values is not None
            as_it_is = values.dtype == self.dtype
            block = values if as_it_is else buffer[:, : values.shape[1]].copy_(values)
            if scales is not None:
                block.unflatten(1, (-1, SHARE)).mul_(scales.unsqueeze(2))
            yield place, block[:, : place.stop - place.start]

    def _part(self, tasks: slice) -> Callable[[slice], Parts]:
        """Some entries as they are stored."""

        def part(place: slice) -> Parts:
            if self.scales is None:
                return self.values[tasks, place], None
            shares = slice(place.start // SHARE, -(-place.stop // SHARE))
            return self.values[tasks, shares.start * SHARE : shares.stop * SHARE], self.scales[tasks, shares]

        return part


def ahead(parts: Iterable[Parts], device: torch.device) -> Iterator[Parts]:
    """Tensors on a device, each on its way there while the one before it is used."""
    if device.type != "cuda":
        yield from (tuple(None if t is None else t.to(device) for t in part) for part in parts)
        return
    stream, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def sent() -> Iterator[Parts]:
        for part in parts:
            with torch.cuda.stream(stream):
                copies = tuple(None if t is None else t.to(device, non_blocking=True) for t in part)
            yield copies

    coming = sent()
    following = next(coming, None)
    while following is not None:
        here.wait_stream(stream)
        part, following = following, next(coming, None)
        for tensor in part:
            if tensor is not None:
                tensor.record_stream(here)
        yield part


def in_file(tensor: Tensor, folder: Path) -> Tensor:
    """The same values in a file of that folder that has no name any more and goes with the tensor.

    Its pages are read when they are used, and the system drops them where memory is short.
    """
    if not tensor.numel():
        return tensor
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="deltas-") as file:
        file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape)
