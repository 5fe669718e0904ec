"""Run by a test in a process of its own, whose environment has kernels interpreted on the CPU."""

import os

import torch
from torch.testing import assert_close

from adamerge import kernels, ops
from adamerge.deltas import dense as whole
from adamerge.ops import weighted_sum, weighted_sums
from adamerge.stored import SHARE, Stored

#: Of 129 entries a share is full and the next has one; the last tensors fill a tile, or begin another.
SHAPES = [(), (5,), (3, 4), (70, 90), (43, 3), (2, 3, 2, 2), (SHARE,), (1, kernels.TILE), (kernels.TILE + 1,)]
DENSE, HALF, BYTES = None, torch.bfloat16, torch.int8


def case(forms: tuple, experts: int) -> tuple:
    """Tensors of all shapes whose deltas take these forms in turn; every fifth has no base."""
    torch.manual_seed(0)
    bases, deltas = [torch.randn(shape) if n % 5 else None for n, shape in enumerate(SHAPES)], []
    for n, shape in enumerate(SHAPES):
        dense, form = torch.randn(experts, *shape), forms[n % len(forms)]
        deltas.append(Stored.from_dense(dense, form) if form else dense)
    return torch.randn(len(SHAPES), experts, dtype=torch.float64).requires_grad_(), bases, deltas


def exact(coefficients, bases, deltas) -> list[torch.Tensor]:
    dense = [whole(delta).double() for delta in deltas]
    bases = [
        torch.zeros_like(delta[0]) if base is None else base.double() for base, delta in zip(bases, dense, strict=True)
    ]
    return [weighted_sum(*each) for each in zip(coefficients, bases, dense, strict=True)]


def check(forms: tuple, experts: int, left_out: int) -> None:
    """Sums and gradients against those in float64, where some tensors take no part in the loss."""
    arguments, targets, grads = case(forms, experts), [torch.randn(shape) for shape in SHAPES], []
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


def check_what_fits() -> None:
    """Bytes that do not begin where a thread may read sixteen at once, or scales in other precision, go elsewhere."""
    stored, base = Stored.from_dense(torch.randn(2, 300), BYTES), torch.zeros(300)
    assert kernels.fits(base, stored)
    shifted = torch.cat([torch.zeros(1, dtype=BYTES), stored.values.flatten()])[1:].view_as(stored.values)
    others = [(shifted, stored.scales)] + [(stored.values, stored.scales.to(t)) for t in (torch.float64, HALF)]
    for values, scales in others:
        other = Stored(values, stored.shape, scales)
        assert other.dtype == torch.float32
        assert not kernels.fits(base, other)
        (merged,) = weighted_sums([torch.tensor([2.0, -1.0])], [base], [other])
        assert_close(merged, 2 * stored[0] - stored[1], rtol=1e-2, atol=1e-2)
    assert not kernels.fits(base.double(), stored.map(lambda tensor: tensor.double()))
    assert kernels.fits(None, stored)
    assert not kernels.fits(torch.zeros(()), stored)
    (merged,) = weighted_sums([torch.tensor([2.0, -1.0])], [torch.ones(())], [stored])
    assert_close(merged, 1 + 2 * stored[0] - stored[1], rtol=1e-5, atol=1e-5)


def check_what_takes_no_gradient() -> None:
    """Where some coefficients stay, their tensors take no gradient; what a loss leaves out is not filled in."""
    _, bases, deltas = case((BYTES, HALF, DENSE), 3)
    rows = [torch.randn(3, requires_grad=n % 2 > 0) for n in range(len(SHAPES))]
    merged = weighted_sums(rows, bases, deltas)
    assert [part.requires_grad for part in merged] == [row.requires_grad for row in rows]
    assert_close([part.detach() for part in merged], weighted_sums([row.detach() for row in rows], bases, deltas))
    addresses, original = [], kernels._contract

    class Noted:
        def __getitem__(self, grid: tuple) -> object:
            return lambda *given, **options: (addresses.extend(given[1].tolist()), original[grid](*given, **options))

    kernels._contract = Noted()
    merged[3].sum().backward()
    kernels._contract = original
    assert [address > 0 for address in addresses] == [n == 3 for n, row in enumerate(rows) if row.requires_grad]
    assert_close(rows[3].grad, torch.stack([delta.sum() for delta in deltas[3]]), rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    arguments = case((BYTES, HALF, DENSE), 3)
    assert all(kernels.fits(base, delta) for base, delta in zip(*arguments[1:], strict=True))
    merged = weighted_sums(*arguments)
    assert len({part.untyped_storage().data_ptr() for part in merged}) == 1, "that was no kernel"
    for forms, experts, left_out in [
        ((DENSE,), 1, 0),
        ((DENSE, HALF), 3, 2),
        ((BYTES,), 1, 0),
        ((BYTES,), 5, 4),
        ((BYTES, HALF, DENSE), 3, 0),
    ]:
        check(forms, experts, left_out)
    check_what_fits()
    check_what_takes_no_gradient()
    for name in ("_merge", "_floats", "_shares", "_add"):
        found = getattr(kernels, name)
        kernels.work.cache_clear()
        setattr(kernels, name, None)  # nothing to call
        assert not kernels.work(torch.device("cpu")), f"{name} is not tried"
        broken = ops.weighted_sums(*arguments)
        assert_close(broken, merged, rtol=1e-5, atol=1e-5)
        setattr(kernels, name, found)
    kernels.work.cache_clear()
    os.environ["ADAMERGE_KERNELS"] = "0"
    ops._kernels.cache_clear()
    plain = ops.weighted_sums(*arguments)
    assert len({part.untyped_storage().data_ptr() for part in plain}) == len(plain), "kernels cannot be turned off"
    assert_close(plain, merged, rtol=1e-5, atol=1e-5)
