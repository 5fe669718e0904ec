"""Deltas shared out over processes, for experts that no single device can hold."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from adamerge.deltas import AnyDeltas, Deltas, mapped
from adamerge.errors import InputError
from adamerge.ops import inner, weighted


class Sharded(Deltas):
    """Every process has a run of consecutive entries of all K experts, the same number each.

    A weighted sum is made where the entries are and gathered, tensor by tensor. Of the gradients, which differ from
    process to process with their images, each process receives the sum over its own entries and contracts it; what
    comes out is the mean over the processes, ⟨1/R Σ_r grad_r, τₖ⟩, the same on all, as
    `torch.nn.parallel.DistributedDataParallel` would make it. All processes must ask for the same things in the same
    order.

    Args:
        part: this process's entries, [K, m], in any form.
        shape: [K, *shape], of n ≤ R m elements each; what is missing at the end counts as zeros.
    """

    def __init__(self, part: AnyDeltas, shape: torch.Size) -> None:
        self.part, self.shape = part, torch.Size(shape)
        self._count, self._size = math.prod(self.shape[1:]), part.shape[1]
        if part.shape[0] != self.shape[0] or self._size != -(-self._count // dist.get_world_size()):
            raise InputError(f"parts of shape {list(part.shape)} do not make deltas of shape {list(self.shape)}")

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    @property
    def device(self) -> torch.device:
        return self.part.device

    @property
    def nbytes(self) -> int:
        return self.part.nbytes

    def weighted(self, coefficients: Tensor) -> Tensor:
        return self._whole(weighted(coefficients, self.part)).view((*coefficients.shape[:-1], *self.shape[1:]))

    def inner(self, grad: Tensor) -> Tensor:
        groups, world = grad.shape[0] if self._grouped(grad) else 1, dist.get_world_size()
        flat = grad.to(self.dtype).reshape(groups, self._count)
        flat = torch.nn.functional.pad(flat, (0, world * self._size - self._count))
        own = flat.new_empty(groups * self._size)
        dist.reduce_scatter_tensor(own, flat.view(groups, world, self._size).movedim(1, 0).flatten())
        products = inner(own.view(groups, self._size) / world, self.part)
        dist.all_reduce(products)
        return products if self._grouped(grad) else products[0]

    def __getitem__(self, k: int) -> Tensor:
        return self._whole(self.part[k]).view(self.shape[1:])

    def any(self) -> bool:
        found = torch.tensor(float(bool(self.part.any())), device=self.device)
        dist.all_reduce(found)
        return bool(found)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Sharded":
        return Sharded(mapped(fn, self.part), self.shape)

    def _whole(self, own: Tensor) -> Tensor:
        """[..., n] of this process's [..., m] and those of the others."""
        parts = own.new_empty(dist.get_world_size() * own.numel())
        dist.all_gather_into_tensor(parts, own.flatten())
        return parts.view(-1, *own.shape).movedim(0, -2).flatten(-2)[..., : self._count]


def own_entries(deltas: Tensor) -> Tensor:
    """This process's part [K, m] of deltas [K, *shape] that all processes have."""
    world, flat = dist.get_world_size(), deltas.unsqueeze(-1).flatten(1)
    size = -(-flat.shape[1] // world)
    own = flat[:, dist.get_rank() * size : (dist.get_rank() + 1) * size]
    return torch.nn.functional.pad(own, (0, size - own.shape[1])).clone()
