"""Three ways to y_g = x_g W_gᵀ with weights W_g = W₀ + Σₖ w_gk τₖ of every group's own; `routed` picks one.

- materialise: compose W_g and multiply with it, in blocks that stay in the cache.
- expand: y_g = x_g W₀ᵀ + Σₖ w_gk x_g τₖᵀ: K + 1 products of the whole batch, and no composed weight.
- factorise: the same through the factors of low-rank deltas, τₖ = Uₖ Vₖ: x_g W₀ᵀ + (w_g ⊙ (x_g Vᵀ)) Uᵀ.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge.deltas import AnyDeltas, LowRank, dense

Composition = Literal["materialise", "expand", "factorise"]

#: Bytes of scratch memory: composed weights, and the base and deltas that they are composed of. On a CPU it should not
#: leave the cache.
SCRATCH_BYTES = {"cpu": 24 << 20, "cuda": 1 << 30}
#: Groups whose weights are composed at a time where not even one whole matrix for each of so many fits.
GROUPS_AT_ONCE = 16


def routed_product(
    x: Tensor, routing: Tensor, matrix: Tensor, deltas: AnyDeltas, transposed: bool, composition: Composition
) -> Tensor:
    """x_g W_gᵀ in one of the three ways, differentiable in x and w alone.

    Args:
        x: [G, M, I].
        routing: w, [G, K], in the dtype of the weights.
        matrix: W₀, [O, I], or [I, O] if `transposed`.
        deltas: [K, *shape] of as many elements.
        transposed: see `matrix`.
        composition: `factorise` is for low-rank deltas.

    Returns:
        [G, M, O].
    """
    if composition == "factorise":
        assert isinstance(deltas, LowRank)
        y = F.linear(x, (matrix.T if transposed else matrix).to(x.dtype))
        return y.add_(_factored(x, routing, deltas, transposed))
    function = _Materialised if composition == "materialise" else _Expanded
    result: Tensor = function.apply(x, routing, _Layer(matrix, deltas, transposed))
    return result


def _factored(x: Tensor, routing: Tensor, deltas: LowRank, transposed: bool) -> Tensor:
    """Σₖ w_gk x_g τₖᵀ through the factors τₖ = Uₖ Vₖ, of which neither is composed."""
    left, right = deltas.left.to(x.dtype), deltas.right.to(x.dtype)  # [K, m, r], [K, r, n]
    into, out = (left.mT, right.mT) if transposed else (right, left)
    rank = into.shape[1]
    inner = F.linear(x, into.flatten(0, 1))  # [G, M, K r]
    inner = inner * routing.to(x.dtype).repeat_interleave(rank, 1).unsqueeze(1)
    return F.linear(inner, out.transpose(0, 1).flatten(1))


@dataclass(frozen=True)
class _Layer:
    """W₀ and its deltas, [O, I] and [K, O, I], or [I, O] and [K, I, O] if `transposed`: "as stored" below."""

    matrix: Tensor
    deltas: AnyDeltas
    transposed: bool

    @property
    def axis(self) -> int:
        """The longer axis as stored, along which the matrix is cut into blocks."""
        return int(self.matrix.shape[1] > self.matrix.shape[0])

    @property
    def cuts_inputs(self) -> bool:
        """Whether a block has all outputs of some inputs, instead of some outputs of all inputs."""
        return (self.axis == 1) != self.transposed

    @property
    def outputs(self) -> int:
        return self.matrix.shape[self.transposed]

    def operator(self, stored: Tensor) -> Tensor:
        """As stored -> [..., I, O]."""
        return stored if self.transposed else stored.mT

    def blocks(self, groups: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """By block along the longer axis: where it is, W₀ and deltas there [K + 1, ...], and room for [g, ...] of them.

        The same memory serves one block after another: fresh memory would cost more than what is computed in it.
        """
        tasks, shape = len(self.deltas), self.matrix.shape
        deltas = dense(self.deltas).reshape(tasks, *shape)
        size, at_once = _tile(self.matrix, tasks + 1, groups)
        scratch = self.matrix.new_empty(tasks + 1 + at_once, size * min(shape))
        for start in range(0, max(shape), size):
            block = self.matrix.narrow(self.axis, start, min(size, max(shape) - start))
            room = scratch.flatten()[: len(scratch) * block.numel()].view(-1, *block.shape)
            staged, room = room[: tasks + 1], room[tasks + 1 :]
            staged[0] = block
            staged[1:] = deltas.narrow(1 + self.axis, start, block.shape[self.axis])
            yield slice(start, start + block.shape[self.axis]), staged, room


def _tile(matrix: Tensor, staged: int, groups: int) -> tuple[int, int]:
    """The length of a block along the longer axis, and how many groups' blocks are composed at a time."""
    budget = SCRATCH_BYTES.get(matrix.device.type, SCRATCH_BYTES["cpu"]) // matrix.element_size()
    long, short, few = max(matrix.shape), min(matrix.shape), max(1, min(groups, GROUPS_AT_ONCE))
    count = -(-long * short * (few + staged) // budget)
    size = -(-long // min(count, long))
    return size, max(few, min(groups, budget // (size * short) - staged))


class _Materialised(torch.autograd.Function):
    """Composes every block twice, forward and backward, and keeps none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Tensor, layer: _Layer) -> Tensor:
        ctx.save_for_backward(x, routing)
        ctx.layer = layer
        y, scales = x.new_empty(*x.shape[:2], layer.outputs), _with_base(routing)
        for block, staged, room in layer.blocks(len(x)):
            for part in _parts(len(x), len(room)):
                weights = layer.operator(_composed(scales[part], staged, room, x.dtype))
                if layer.cuts_inputs:
                    y[part].baddbmm_(x[part, :, block], weights, beta=int(block.start > 0))
                else:
                    y[part, :, block] = torch.bmm(x[part], weights)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, routing), layer = ctx.saved_tensors, ctx.layer
        scales = _with_base(routing)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_routing = torch.zeros_like(routing) if ctx.needs_input_grad[1] else None
        for block, staged, room in layer.blocks(len(x)):
            for part in _parts(len(x), len(room)):
                into, out = x[part], grad[part]
                into, out = (into[..., block], out) if layer.cuts_inputs else (into, out[..., block])
                if grad_x is not None:
                    weights = layer.operator(_composed(scales[part], staged, room, x.dtype)).mT
                    if layer.cuts_inputs:
                        grad_x[part, :, block] = torch.bmm(out, weights)
                    else:
                        grad_x[part].baddbmm_(out, weights, beta=int(block.start > 0))
                if grad_routing is not None:
                    left, right = (into, out) if layer.transposed else (out, into)
                    grad_routing[part] += _inner(left, right, staged[1:], room)
        return grad_x, grad_routing, None


class _Expanded(torch.autograd.Function):
    """One expert at a time for the whole batch; no product is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Tensor, layer: _Layer) -> Tensor:
        ctx.save_for_backward(x, routing)
        ctx.layer = layer
        y = torch.matmul(x, layer.operator(layer.matrix).to(x.dtype)).to(routing.dtype)
        for scale, operator in zip(routing.unbind(1), _operators(layer, x.dtype), strict=True):
            y.addcmul_(torch.matmul(x, operator), scale[:, None, None])
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, routing), layer = ctx.saved_tensors, ctx.layer
        grad_x, inner = torch.matmul(grad, layer.operator(layer.matrix).to(x.dtype).mT).to(routing.dtype), []
        for scale, operator in zip(routing.unbind(1), _operators(layer, x.dtype), strict=True):
            product = torch.matmul(grad, operator.mT)  # [G, M, I]
            inner.append((product * x).sum((1, 2), dtype=routing.dtype))
            grad_x.addcmul_(product, scale[:, None, None])
        return grad_x.to(x.dtype), torch.stack(inner, 1), None


def _operators(layer: _Layer, dtype: torch.dtype) -> Iterator[Tensor]:
    """τₖ as [I, O], one after another."""
    return (layer.operator(delta.reshape(layer.matrix.shape)).to(dtype) for delta in layer.deltas)


def _with_base(routing: Tensor) -> Tensor:
    """[G, K] -> [G, K + 1]: the base counts once."""
    return torch.cat([routing.new_ones(len(routing), 1), routing], 1)


def _composed(scales: Tensor, staged: Tensor, room: Tensor, dtype: torch.dtype) -> Tensor:
    """[g, ...] blocks of weights, for scales [g, K + 1] and staged blocks [K + 1, ...]."""
    weights = room[: len(scales)]
    torch.mm(scales, staged.flatten(1), out=weights.flatten(1))
    return weights.to(dtype)


def _inner(left: Tensor, right: Tensor, deltas: Tensor, room: Tensor) -> Tensor:
    """⟨leftᵀ right, τₖ⟩ [g, K] for [g, M, a], [g, M, b] and [K, a, b]."""
    outer = torch.bmm(left.mT, right, out=room[: len(left)] if left.dtype == room.dtype else None).to(deltas.dtype)
    # A product for every row, so that they run in parallel: one product over all elements would not.
    return torch.bmm(deltas.transpose(0, 1), outer.permute(1, 2, 0)).sum(0).T


def _parts(groups: int, at_once: int) -> Iterator[slice]:
    return (slice(start, start + at_once) for start in range(0, groups, at_once))
