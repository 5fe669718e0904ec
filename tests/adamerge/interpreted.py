"""Run by a test in a process of its own, whose environment has kernels interpreted on the CPU."""

import os

import torch
from torch.testing import assert_close

from adamerge import kernels, ops
from adamerge.ops import weighted_sum, weighted_sums
from adamerge.stored import Stored

SHAPES = [(), (5,), (3, 4), (70, 90), (2, 3, 2, 2), (1, kernels.TILE), (kernels.TILE + 1,)]


def case(half: bool, experts: int) -> tuple:
    torch.manual_seed(0)
    bases = [torch.randn(shape) for shape in SHAPES]
    dense = [torch.randn(experts, *shape) for shape in SHAPES]
    deltas = [Stored.from_dense(delta, torch.bfloat16) if half and n % 2 else delta for n, delta in enumerate(dense)]
    return torch.randn(len(SHAPES), experts, dtype=torch.float64).requires_grad_(), bases, deltas


def exact(coefficients, bases, deltas) -> list[torch.Tensor]:
    whole = [(delta.dense() if isinstance(delta, Stored) else delta).double() for delta in deltas]
    return [weighted_sum(*each) for each in zip(coefficients, [base.double() for base in bases], whole, strict=True)]


def check(half: bool, experts: int, left_out: int) -> None:
    """Sums and gradients against those in float64, where some tensors take no part in the loss."""
    arguments, targets, grads = case(half, experts), [torch.randn(shape) for shape in SHAPES], []
    for sums in (weighted_sums, exact):
        merged = sums(*arguments)
        assert [part.shape for part in merged] == [torch.Size(shape) for shape in SHAPES]
        loss = sum(((part - target) ** 2).sum() for part, target in list(zip(merged, targets, strict=True))[left_out:])
        grads.append((merged, *torch.autograd.grad(loss, arguments[0])))
    for part, expected in zip(*(merged for merged, _ in grads), strict=True):
        assert part.dtype == torch.float32
        assert_close(part.double(), expected, rtol=1e-5, atol=1e-5)
    assert grads[0][1].dtype == torch.float64
    assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    arguments = case(True, 3)
    assert all(kernels.fits(base, delta) for base, delta in zip(*arguments[1:], strict=True))
    merged = weighted_sums(*arguments)
    assert len({part.untyped_storage().data_ptr() for part in merged}) == 1, "that was no kernel"
    for half, experts, left_out in [(False, 1, 0), (False, 3, 2), (True, 3, 0), (True, 5, 3)]:
        check(half, experts, left_out)
    found = kernels._merge
    kernels.work.cache_clear()
    kernels._merge = None  # nothing to launch
    assert not kernels.work(torch.device("cpu"))
    broken = ops.weighted_sums(*arguments)
    assert_close(broken, merged, rtol=1e-5, atol=1e-5)
    kernels._merge = found
    kernels.work.cache_clear()
    os.environ["ADAMERGE_KERNELS"] = "0"
    ops._kernels.cache_clear()
    plain = ops.weighted_sums(*arguments)
    assert len({part.untyped_storage().data_ptr() for part in plain}) == len(plain), "kernels cannot be turned off"
    assert_close(plain, merged, rtol=1e-5, atol=1e-5)
