"""The weighted sum and its gradient, against autograd's own chain."""

import pytest
import torch
from torch.testing import assert_close

from adamerge.deltas import LowRank, Sparse
from adamerge.ops import column_sum, weighted_sum, weighted_sums

SHAPES = [(), (5,), (3, 4), (2, 3, 2, 2), (0, 3)]


def inputs(shape: tuple[int, ...], k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    coefficients = torch.randn(k, dtype=torch.float64, requires_grad=True)
    return coefficients, torch.randn(shape, dtype=torch.float64), torch.randn(k, *shape, dtype=torch.float64)


def chain(coefficients, base, deltas):
    """The same sum as autograd sees it."""
    return base + sum(value * delta for value, delta in zip(coefficients, deltas, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_it_is_the_sum(shape, k):
    arguments = inputs(shape, k)
    assert_close(weighted_sum(*arguments), chain(*arguments), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_base_is_zero(shape):
    coefficients, base, deltas = inputs(shape)
    expected = chain(coefficients, torch.zeros_like(base), deltas)
    found = [weighted_sum(coefficients, None, deltas), *weighted_sums([coefficients], [None], [deltas])]
    if len(shape) > 1:
        found.append(column_sum(coefficients.expand(shape[1], -1), None, deltas))
    for merged in found:
        assert_close(merged, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_gradient_passes_gradcheck(shape):
    assert torch.autograd.gradcheck(weighted_sum, inputs(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_gradient_is_autograds(shape):
    coefficients, base, deltas = inputs(shape)
    target = torch.randn(shape, dtype=torch.float64)
    grads = [
        torch.autograd.grad(((f(coefficients, base, deltas) - target) ** 2).sum(), coefficients)[0]
        for f in (weighted_sum, chain)
    ]
    assert_close(grads[0], grads[1], rtol=1e-13, atol=1e-13)


def test_a_gradient_that_is_no_contiguous_tensor():
    coefficients, base, deltas = inputs((3, 4))
    weights = torch.randn(4, 3, dtype=torch.float64)
    grads = [
        torch.autograd.grad((f(coefficients, base, deltas).T * weights).sum(), coefficients)[0]
        for f in (weighted_sum, chain)
    ]
    assert_close(grads[0], grads[1], rtol=1e-13, atol=1e-13)


def test_deltas_that_are_no_contiguous_tensor():
    coefficients, base, deltas = inputs((4, 3))
    base, deltas = base.T, deltas.transpose(1, 2)
    assert_close(weighted_sum(coefficients, base, deltas), chain(coefficients, base, deltas), rtol=1e-14, atol=1e-14)


def test_nothing_but_the_coefficients_takes_a_gradient_or_changes():
    coefficients, base, deltas = inputs((3, 4))
    before = base.clone(), deltas.clone(), coefficients.detach().clone()
    merged = weighted_sum(coefficients, base.requires_grad_(), deltas.requires_grad_())
    merged.sum().backward()
    assert base.grad is None
    assert deltas.grad is None
    assert all(torch.equal(now, then) for now, then in zip((base, deltas, coefficients), before, strict=True))


@pytest.mark.parametrize(("coefficients", "tensors"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_the_gradient_has_the_dtype_of_the_coefficients(coefficients, tensors):
    values = torch.randn(3, dtype=coefficients, requires_grad=True)
    merged = weighted_sum(values, torch.randn(4, dtype=tensors), torch.randn(3, 4, dtype=tensors))
    assert merged.dtype == tensors
    merged.sum().backward()
    assert values.grad.dtype == coefficients


def test_no_product_of_an_expert_is_kept_for_the_backward_pass():
    saved = []
    coefficients, base, deltas = inputs((3, 4))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        weighted_sum(coefficients, base, deltas)
    assert saved == []


MATRICES = [shape for shape in SHAPES if len(shape) > 1 and 0 not in shape] + [(4, 1), (2, 5, 3)]


def columns(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(shape[1], 3, dtype=torch.float64, requires_grad=True), *inputs(shape)[1:]


def column_chain(coefficients, base, deltas):
    """The sum over experts of their products with the columns' coefficients, as autograd sees it."""
    return base + torch.einsum("jk,koj...->oj...", coefficients, deltas)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_columns_are_weighted_by_their_own_coefficients(shape):
    coefficients, base, deltas = columns(shape)
    assert_close(column_sum(coefficients, base, deltas), column_chain(coefficients, base, deltas))
    assert torch.autograd.gradcheck(column_sum, (coefficients, base, deltas))
    same = coefficients[:1].expand_as(coefficients)
    assert_close(column_sum(same, base, deltas), weighted_sum(coefficients[0], base, deltas))


@pytest.mark.parametrize("form", [Sparse.from_dense, lambda deltas: LowRank.from_dense(deltas, 3)])
def test_columns_of_compressed_deltas(form):
    coefficients, base, deltas = columns((3, 4))
    target = torch.randn(3, 4, dtype=torch.float64)
    values = [column_sum(coefficients, base, each) for each in (form(deltas), deltas)]
    grads = [torch.autograd.grad((value - target).square().sum(), coefficients)[0] for value in values]
    assert_close(values[0], values[1])
    assert_close(grads[0], grads[1])


def test_columns_keep_the_dtype_of_their_coefficients_and_save_nothing():
    saved = []
    coefficients = torch.randn(4, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        merged = column_sum(coefficients, torch.randn(2, 4).double(), torch.randn(3, 2, 4).double())
    merged.sum().backward()
    assert (merged.dtype, coefficients.grad.dtype, saved) == (torch.float64, torch.float32, [])
