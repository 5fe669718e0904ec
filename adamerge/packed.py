"""The K deltas of one tensor in a bit or two for every element: masks and signs, and what all tasks share."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from adamerge.deltas import Deltas
from adamerge.errors import InputError


def pack(bits: Tensor) -> Tensor:
    """Booleans [K, *shape], eight to a byte: [K, ⌈n / 8⌉] for n elements each, the first in the lowest bit."""
    rows, places = [], torch.arange(8, device=bits.device, dtype=torch.uint8)
    for row in bits:
        flat = torch.nn.functional.pad(row.flatten().to(torch.uint8), (0, -row.numel() % 8))
        rows.append((flat.view(-1, 8) << places).sum(1, dtype=torch.uint8))
    return torch.stack(rows)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of a row of bytes, as zeros and ones in uint8, [count]."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(1) >> places) & 1).flatten()[:count]


class Packed(Deltas):
    """τₖ = aₖ · v ⊙ mₖ ⊙ sₖ: a number, a mask and signs for each task, and a tensor that all tasks share.

    A mask and signs take one bit an element each. What is left out counts as ones.

    Args:
        scales: a, [K].
        shape: [K, *shape].
        shared: v, [*shape], in the dtype of the scales.
        masks: m, packed by `pack`: a bit that is set keeps the element.
        signs: s, likewise: a bit that is set stands for +1, another for −1.
    """

    def __init__(
        self,
        scales: Tensor,
        shape: torch.Size,
        shared: Tensor | None = None,
        masks: Tensor | None = None,
        signs: Tensor | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        self.scales, self.shared, self.masks, self.signs = scales, shared, masks, signs
        tasks, self._count = self.shape[0], math.prod(self.shape[1:])
        fits = scales.shape == (tasks,) and (shared is None or shared.shape == self.shape[1:])
        if not fits or any(bits.shape != (tasks, -(-self._count // 8)) for bits in self._bits()):
            held = [list(part.shape) for part in (scales, shared, *self._bits()) if part is not None]
            raise InputError(f"parts of shapes {held} do not make packed deltas of shape {list(self.shape)}")

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.scales.device

    @property
    def nbytes(self) -> int:
        parts = (self.scales, self.shared, *self._bits())
        return sum(part.nbytes for part in parts if part is not None)

    def weighted(self, coefficients: Tensor) -> Tensor:
        groups = coefficients.shape[:-1]
        total = self.scales.new_zeros(*groups, self._count)
        for k, column in enumerate((coefficients.to(self.dtype) * self.scales).unsqueeze(-1).unbind(-2)):
            total.addcmul_(column, self._factor(k))
        total = total.view((*groups, *self.shape[1:]))
        return total if self.shared is None else total.mul_(self.shared)

    def inner(self, grad: Tensor) -> Tensor:
        grad = grad.to(self.dtype)
        groups = grad.shape[0] if self._grouped(grad) else 1
        flat = (grad if self.shared is None else grad * self.shared).reshape(groups, self._count)
        products = torch.stack([flat @ self._factor(k) for k in range(len(self))], -1) * self.scales
        return products if self._grouped(grad) else products[0]

    def __getitem__(self, k: int) -> Tensor:
        delta = (self.scales[k] * self._factor(k)).view(self.shape[1:])
        return delta if self.shared is None else delta * self.shared

    def any(self) -> bool:
        return any(bool(delta.any()) for delta in self)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Packed":
        scales, shared = fn(self.scales), None if self.shared is None else fn(self.shared)
        # Bits are no values: in half precision they would be lost.
        masks, signs = (None if bits is None else bits.to(scales.device) for bits in (self.masks, self.signs))
        return Packed(scales, self.shape, shared, masks, signs)

    def _bits(self) -> list[Tensor]:
        return [bits for bits in (self.masks, self.signs) if bits is not None]

    def _factor(self, k: int) -> Tensor:
        """mₖ ⊙ sₖ, flat, in the dtype of the values."""
        if self.signs is None:
            mask = None if self.masks is None else unpack(self.masks[k], self._count)
            return self.scales.new_ones(self._count) if mask is None else mask.to(self.dtype)
        factor = unpack(self.signs[k], self._count).to(self.dtype).mul_(2).sub_(1)
        return factor if self.masks is None else factor.mul_(unpack(self.masks[k], self._count))
