"""The K deltas of one tensor in less memory than [K, *shape]: low-rank factors, or the few entries that are left."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.linalg import right_vectors

#: Above this many elements, 32-bit positions do not reach.
_INT32 = 2**31 - 1


class Deltas(ABC):
    """τ₁ … τ_K of one tensor, compressed. Never changed in place, and no part of any autograd graph.

    Attributes:
        shape: [K, *shape], that of the dense form.
    """

    shape: torch.Size

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the values, and of everything computed from them."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the values are."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def weighted(self, coefficients: Tensor) -> Tensor:
        """Σₖ λₖ τₖ for coefficients [K] or [G, K] -> [*shape] or [G, *shape]."""

    @abstractmethod
    def inner(self, grad: Tensor) -> Tensor:
        """⟨grad, τₖ⟩ for a gradient [*shape] or [G, *shape] -> [K] or [G, K]."""

    @abstractmethod
    def __getitem__(self, k: int) -> Tensor:
        """τₖ, dense."""

    @abstractmethod
    def any(self) -> bool:
        """Whether anything is not zero."""

    @abstractmethod
    def map(self, fn: Callable[[Tensor], Tensor]) -> "Deltas":
        """The same deltas with `fn` applied to the values, as `torch.nn.Module._apply` does: a device or a dtype."""

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[k] for k in range(len(self)))

    def dense(self) -> Tensor:
        """[K, *shape]."""
        return torch.stack(list(self))

    def _grouped(self, grad: Tensor) -> bool:
        """Whether a gradient has a leading axis of groups."""
        return grad.dim() == len(self.shape)


#: The deltas of one tensor in any form.
AnyDeltas: TypeAlias = Tensor | Deltas


def dense(deltas: AnyDeltas) -> Tensor:
    """[K, *shape] of deltas in any form; those that are dense come back as they are."""
    return deltas.dense() if isinstance(deltas, Deltas) else deltas


def changed(deltas: AnyDeltas) -> bool:
    """Whether anything is not zero; a few entries tell as a rule."""
    few = deltas[0].flatten()[:64] if isinstance(deltas, Tensor) and len(deltas) else deltas
    return bool(few.any()) or bool(deltas.any())


def mapped(fn: Callable[[Tensor], Tensor], deltas: AnyDeltas) -> AnyDeltas:
    """`fn` on deltas in any form; see `Deltas.map`."""
    return deltas.map(fn) if isinstance(deltas, Deltas) else fn(deltas)


class LowRank(Deltas):
    """τₖ = Lₖ Rₖ, with r (m + n) numbers for m × n of them.

    A tensor of more than two axes is seen as the matrix [shape[0], rest].

    Args:
        left: L, [K, m, r].
        right: R, [K, r, n].
        shape: [K, *shape] with shape[0] = m and the rest n elements; default [K, m, n].
    """

    def __init__(self, left: Tensor, right: Tensor, shape: torch.Size | None = None) -> None:
        (tasks, rows, rank), columns = left.shape, right.shape[-1]
        self.shape = torch.Size((tasks, rows, columns)) if shape is None else torch.Size(shape)
        fits = right.shape == (tasks, rank, columns) and len(self.shape) > 2 and self.shape[:2] == (tasks, rows)
        if not fits or math.prod(self.shape[2:]) != columns:
            sizes = f"{list(left.shape)} and {list(right.shape)}"
            raise InputError(f"factors of shapes {sizes} do not make deltas of shape {list(self.shape)}")
        self.left, self.right = left, right

    @classmethod
    def from_dense(cls, deltas: Tensor, rank: int, name: str = "a tensor") -> "LowRank":
        """The nearest matrices of that rank: each τₖ = U S Vᵀ cut to its `rank` largest singular values.

        Args:
            deltas: [K, m, ...].
            rank: at most min(m, n).
            name: of the tensor, for errors.

        Raises:
            InputError: for a rank that is no such number, and where no decomposition is found.
        """
        most = min(deltas.shape[1], math.prod(deltas.shape[2:])) if deltas.dim() > 2 else 0
        if not 1 <= rank <= most:
            limit = f"1 to {most}" if most else "a matrix"
            raise InputError(f"{name}: rank {rank} for deltas of shape {list(deltas.shape)}, expected {limit}")
        factors = [_truncate(matrix, rank, name) for matrix in deltas.flatten(2)]
        left, right = (torch.stack(parts) for parts in zip(*factors, strict=True))
        return cls(left, right, deltas.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def weighted(self, coefficients: Tensor) -> Tensor:
        (tasks, rows, rank), columns = self.left.shape, self.right.shape[-1]
        # Side by side, the factors of all tasks make the sum one product, with λ on the smaller of the two.
        wide, tall = self._wide(), self.right.reshape(tasks * rank, columns)
        scales = coefficients.to(self.dtype).repeat_interleave(rank, -1)
        product = (wide * scales.unsqueeze(-2)) @ tall if rows <= columns else wide @ (scales.unsqueeze(-1) * tall)
        return product.reshape(*coefficients.shape[:-1], *self.shape[1:])

    def inner(self, grad: Tensor) -> Tensor:
        (tasks, rows, rank), columns = self.left.shape, self.right.shape[-1]
        wide, tall = self._wide(), self.right.reshape(tasks * rank, columns)
        groups = grad.shape[0] if self._grouped(grad) else 1
        matrix = grad.to(self.dtype).reshape(groups, rows, columns)
        # ⟨G, L R⟩ = Σ (G Rᵀ) ∘ L = Σ (Lᵀ G) ∘ R: contracting the longer side first leaves the smaller product.
        if rows <= columns:
            sums = torch.einsum("gmr,mr->gr", matrix @ tall.T, wide)
        else:
            sums = torch.einsum("grn,rn->gr", wide.T @ matrix, tall)
        products = sums.unflatten(-1, (tasks, rank)).sum(-1)
        return products if self._grouped(grad) else products[0]

    def __getitem__(self, k: int) -> Tensor:
        return (self.left[k] @ self.right[k]).view(self.shape[1:])

    def any(self) -> bool:
        return bool(self.left.any()) and bool(self.right.any())

    def map(self, fn: Callable[[Tensor], Tensor]) -> "LowRank":
        return LowRank(fn(self.left), fn(self.right), self.shape)

    def _wide(self) -> Tensor:
        """[m, K·r]."""
        return self.left.transpose(0, 1).flatten(1)


def _truncate(matrix: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """L [m, r] and R [r, n] of one matrix, R (or, for a tall matrix, L) with orthonormal rows (columns)."""
    exact = matrix.double()
    if exact.shape[0] < exact.shape[1]:
        right, left = _truncate(matrix.T, rank, name)
        return left.T.contiguous(), right.T.contiguous()
    basis = right_vectors(exact, name)[1][:, :rank]
    return (exact @ basis).to(matrix.dtype), basis.T.to(matrix.dtype).contiguous()


class Sparse(Deltas):
    """The entries that are not zero: for every task, their flat positions and values.

    An entry takes a value and a position of 4 bytes (8 above 2³¹ elements) instead of one value for every element.

    Args:
        indices: flat positions within [*shape], those of the first task, then those of the second, ...; each task has
            a position at most once.
        values: as many values.
        counts: how many of them each of the K tasks has.
        shape: [K, *shape].
    """

    def __init__(self, indices: Tensor, values: Tensor, counts: tuple[int, ...], shape: torch.Size) -> None:
        self.shape = torch.Size(shape)
        if len(counts) != self.shape[0] or not indices.shape == values.shape == (sum(counts),):
            held = f"{tuple(indices.shape)} positions, {tuple(values.shape)} values and {len(counts)} counts"
            raise InputError(f"{held} do not make sparse deltas of shape {list(self.shape)}")
        self.indices, self.values, self.counts = indices, values, tuple(counts)

    @classmethod
    def from_dense(cls, deltas: AnyDeltas) -> "Sparse":
        """The entries of [K, *shape] that are not zero."""
        indices, values = [], []
        for delta in deltas:
            flat = delta.flatten()
            position = flat.nonzero().squeeze(1)
            values.append(flat[position])
            indices.append(position.int() if flat.numel() <= _INT32 else position)
        return cls(torch.cat(indices), torch.cat(values), tuple(map(len, values)), deltas.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.values.nbytes

    def weighted(self, coefficients: Tensor) -> Tensor:
        groups = coefficients.shape[:-1]
        flat = self.values.new_zeros(*groups, math.prod(self.shape[1:]))
        columns = coefficients.to(self.dtype).unsqueeze(-1).unbind(-2)
        for column, (indices, values) in zip(columns, self._tasks(), strict=True):
            flat.index_add_(-1, indices, column * values)
        return flat.view((*groups, *self.shape[1:]))

    def inner(self, grad: Tensor) -> Tensor:
        groups = grad.shape[0] if self._grouped(grad) else 1
        flat = grad.to(self.dtype).reshape(groups, math.prod(self.shape[1:]))
        products = torch.stack([flat.index_select(1, indices) @ values for indices, values in self._tasks()], -1)
        return products if self._grouped(grad) else products[0]

    def __getitem__(self, k: int) -> Tensor:
        indices, values = self._tasks()[k]
        return values.new_zeros(math.prod(self.shape[1:])).index_copy_(0, indices.long(), values).view(self.shape[1:])

    def any(self) -> bool:
        return bool(self.values.any())

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Sparse":
        values = fn(self.values)
        # A position is no value: half precision could not even hold it.
        return Sparse(self.indices.to(values.device), values, self.counts, self.shape)

    def _tasks(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.indices.split(self.counts), self.values.split(self.counts), strict=True))
