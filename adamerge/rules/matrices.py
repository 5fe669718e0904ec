"""Which tensors a rule over matrices sees as matrices."""

import re
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.rules.base import Rule, Stack

_FUSED = re.compile(r"(^|[._])(in_proj_weight|qkv\.weight|c_attn\.weight)$")


@dataclass(frozen=True)
class Matrices:
    """What is a matrix: tensors of two axes, embeddings among them, as in the code of the papers.

    Attributes:
        average: a regular expression; tensors in whose names it is found are averaged, as vectors are.
        convolutions: whether tensors of more than two axes are matrices too, [shape[0], rest].
        split_qkv: whether fused projections [3d, d] (`in_proj_weight`, `qkv.weight`, or `c_attn.weight` [d, 3d]) are
            three matrices, as they are in models that hold them apart. Spectra differ.
    """

    average: str | None = None
    convolutions: bool = False
    split_qkv: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.average or "")
        except re.error as error:
            raise InputError(f"average={self.average!r} in Matrices is no regular expression: {error}") from error

    def axis(self, name: str, shape: torch.Size) -> int | None:
        """The axis of [m, n] along which three projections are fused, if they are to be split."""
        if not self.split_qkv or not _FUSED.search(name) or len(shape) != 2:
            return None
        return next((axis for axis in (0, 1) if shape[axis] == 3 * shape[1 - axis]), None)

    def match(self, name: str, shape: torch.Size) -> bool:
        """Whether a tensor is seen as a matrix."""
        if len(shape) < 2 or (len(shape) > 2 and not self.convolutions):
            return False
        return self.average is None or re.search(self.average, name) is None

    def parts(self, stack: Stack) -> list[Stack]:
        """The matrices in a tensor: none, one, or three. Their bases are [m, n], their deltas [K, m, n]."""
        if not self.match(stack.name, stack.base.shape):
            return []
        axis = self.axis(stack.name, stack.base.shape)
        if axis is None:
            return [replace(stack, base=stack.base.flatten(1), deltas=stack.deltas.flatten(2))]
        pairs = zip(stack.base.chunk(3, axis), stack.deltas.chunk(3, axis + 1), strict=True)
        return [replace(stack, base=base, deltas=deltas) for base, deltas in pairs]

    def whole(self, name: str, parts: list[Tensor], shape: torch.Size) -> Tensor:
        """The tensor [*shape] of the matrices that `parts` found."""
        return torch.cat(parts, self.axis(name, shape) or 0).reshape(shape)


#: The default: every tensor of two axes, as it is.
TWO_AXES = Matrices()


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
        parts = self.matrices.parts(stack)
        if not parts:
            return stack.deltas.mean(0)
        changes = [self.matrix(part) if bool(part.deltas.any()) else torch.zeros_like(part.base) for part in parts]
        return self.matrices.whole(stack.name, changes, stack.base.shape).to(stack.deltas.dtype)


def rounding(stack: Stack) -> float:
    """Below this, singular values of Σₖ Δₖ are what rounding the weights leaves: ε (|θ₀| + maxₖ |Δₖ|)."""
    base, *deltas = (float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in (stack.base, *stack.deltas))
    return torch.finfo(stack.deltas.dtype).eps * (base + max(deltas))


def batches(deltas: Tensor) -> tuple[Tensor, ...]:
    """[K, m, n] at once on a GPU, and one after the other, in less memory, elsewhere."""
    return (deltas,) if deltas.is_cuda else deltas.split(1)


def side_by_side(left: Tensor) -> Tensor:
    """[K, m, r] -> [m, K·r]."""
    return left.transpose(0, 1).flatten(1)
