"""Which tensors a rule over matrices sees as matrices."""

import re
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adamerge.deltas import AnyDeltas, dense
from adamerge.errors import InputError
from adamerge.kinds import is_table
from adamerge.rules.base import PerTensor, Rule, Stack


@dataclass(frozen=True)
class Matrices:
    """What is a matrix: tensors of two axes. All others a rule takes as vectors, which most of them average.

    Queries, keys and values in one tensor are one matrix, unless `adamerge.merge` is told to split them.

    Attributes:
        average: a regular expression; tensors in whose names it is found are averaged, as vectors are.
        convolutions: whether tensors of more than two axes are matrices too, [shape[0], rest].
        tables: whether embeddings of tokens and positions (`adamerge.kinds.is_table`) are: the code of TSV-M, Iso, SVC
            and WUDI sees them so; that of OPCM, CART, DRM and DOGE, and here of `KnOts`, sees linear layers alone.
    """

    average: str | None = None
    convolutions: bool = False
    tables: bool = True

    def __post_init__(self) -> None:
        try:
            re.compile(self.average or "")
        except re.error as error:
            raise InputError(f"average={self.average!r} in Matrices is no regular expression: {error}") from error

    def match(self, name: str, shape: torch.Size) -> bool:
        """Whether a tensor is seen as a matrix."""
        if len(shape) < 2 or (len(shape) > 2 and not self.convolutions):
            return False
        if not self.tables and is_table(name):
            return False
        return self.average is None or re.search(self.average, name) is None


#: The default of most rules: every tensor of two axes, as it is.
TWO_AXES = Matrices()
#: Weights of linear layers, as far as names tell.
LINEAR = Matrices(tables=False)


class MatrixRule(Rule[None]):
    """A rule for matrices. Every other tensor is averaged.

    Args:
        matrices: which tensors are matrices.
    """

    def __init__(self, matrices: Matrices = TWO_AXES) -> None:
        self.matrices = matrices

    @abstractmethod
    def matrix(self, stack: Stack) -> Tensor:
        """The change of one matrix, [m, n], of deltas [K, m, n] that are not all zero."""

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        if not self.matrices.match(stack.name, stack.base.shape):
            return stack.deltas.mean(0)
        if not bool(stack.deltas.any()):
            return torch.zeros_like(stack.base)
        change = self.matrix(replace(stack, base=stack.base.flatten(1), deltas=stack.deltas.flatten(2)))
        return change.view(stack.base.shape).to(stack.deltas.dtype)


class MatrixTransform(PerTensor[None]):
    """A transform of matrices, expert by expert. Every other tensor stays.

    Args:
        matrices: which tensors are matrices.
    """

    def __init__(self, matrices: Matrices = TWO_AXES) -> None:
        self.matrices = matrices

    @abstractmethod
    def matrix(self, deltas: Tensor, name: str) -> Tensor:
        """The new deltas of one matrix, [K, m, n]."""

    def tensor(self, name: str, deltas: AnyDeltas, statistics: None) -> AnyDeltas:
        if not self.matrices.match(name, deltas.shape[1:]):
            return deltas
        return self.matrix(dense(deltas).flatten(2), name).view(deltas.shape).to(deltas.dtype)


def rounding(stack: Stack) -> float:
    """Below this, singular values of Σₖ Δₖ are what rounding the weights leaves: ε (|θ₀| + maxₖ |Δₖ|)."""
    base, *deltas = (float(torch.linalg.vector_norm(each)) for each in (stack.base, *stack.deltas))
    return torch.finfo(stack.deltas.dtype).eps * (base + max(deltas))


def total(deltas: Tensor) -> Tensor:
    """Σₖ Δₖ in float64, [m, n] of [K, m, n]: `sum` with another dtype takes as long as a decomposition."""
    out = deltas[0].to(torch.float64, copy=True)
    for delta in deltas[1:]:
        out += delta
    return out


def batches(deltas: Tensor) -> tuple[Tensor, ...]:
    """[K, m, n] at once on a GPU, and one after the other, in less memory, elsewhere."""
    return (deltas,) if deltas.is_cuda else deltas.split(1)


def side_by_side(left: Tensor) -> Tensor:
    """[K, m, r] -> [m, K·r]."""
    return left.transpose(0, 1).flatten(1)
