"""Linear layers with weights of their own for every group, against a loop over the groups."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from adamerge import routed
from adamerge.deltas import AnyDeltas, LowRank, Sparse, dense
from adamerge.routed import routed_linear

GROUPS, ROWS, INTO, OUT, TASKS = 5, 4, 6, 7, 3
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def plain_deltas(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(TASKS, *shape, dtype=torch.float64)


def low_rank(shape: tuple[int, ...]) -> LowRank:
    return LowRank(plain_deltas((shape[0], 2)), plain_deltas((2, shape[1])))


def sparse(shape: tuple[int, ...]) -> Sparse:
    values = plain_deltas(shape)
    return Sparse.from_dense(torch.where(values.abs() > 0.8, values, 0))


def none(shape: tuple[int, ...]) -> None:
    """No expert changed the tensor."""


FORMS = [plain_deltas, low_rank, sparse, none]


def inputs() -> tuple[Tensor, Tensor]:
    x, routing = torch.randn(GROUPS, ROWS, INTO), torch.randn(GROUPS, TASKS)
    return x.double().requires_grad_(), routing.double().requires_grad_()


def layer(form, bias: str, transposed: bool):
    shape = (INTO, OUT) if transposed else (OUT, INTO)
    weight = torch.randn(shape, dtype=torch.float64), form(shape)
    given = {"moved": plain_deltas((OUT,)), "sparse": sparse((OUT,)), "same": None}
    return weight, None if bias == "without" else (torch.randn(OUT, dtype=torch.float64), given[bias])


def composed(routing: Tensor, base: Tensor, deltas: AnyDeltas | None) -> Tensor:
    return base if deltas is None else base + sum(w * delta for w, delta in zip(routing, dense(deltas), strict=True))


def loop(x: Tensor, routing: Tensor, weight, bias, transposed: bool) -> Tensor:
    outputs = []
    for rows, own in zip(x, routing, strict=True):
        matrix = composed(own, *weight)
        offset = None if bias is None else composed(own, *bias)
        outputs.append(F.linear(rows, matrix.T if transposed else matrix, offset))
    return torch.stack(outputs)


CASES = [
    pytest.param(form, bias, transposed, id=f"{form.__name__}-bias {bias}{'-transposed' * transposed}")
    for form in FORMS
    for bias in ("without", "same", "moved", "sparse")
    for transposed in (False, True)
]


@pytest.mark.parametrize(("form", "bias", "transposed"), CASES)
class TestAgainstALoop:
    def test_outputs_and_gradients(self, form, bias, transposed):
        (x, routing), (weight, offset) = inputs(), layer(form, bias, transposed)
        result = routed_linear(x, routing, weight, offset, transposed)
        expected = loop(x, routing, weight, offset, transposed)
        assert result.shape == (GROUPS, ROWS, OUT)
        assert_close(result, expected, **EXACT)
        if expected.grad_fn is not None:
            outer = torch.randn_like(expected)
            own = torch.autograd.grad(result, (x, routing), outer, allow_unused=True)
            other = torch.autograd.grad(expected, (x, routing), outer, allow_unused=True)
            for mine, theirs in zip(own, other, strict=True):
                assert_close(mine, theirs, **EXACT)

    def test_gradcheck(self, form, bias, transposed):
        (x, routing), (weight, offset) = inputs(), layer(form, bias, transposed)
        assert torch.autograd.gradcheck(
            lambda x, routing: routed_linear(x, routing, weight, offset, transposed), (x[:2, :2], routing[:2])
        )

    def test_zero_is_the_base_and_one_hot_an_expert(self, form, bias, transposed):
        (x, _), (weight, offset) = inputs(), layer(form, bias, transposed)
        for routing in (torch.zeros(TASKS), *torch.eye(TASKS)):
            rows = routing.double().expand(GROUPS, -1)
            matrix = composed(routing, *weight)
            own = None if offset is None else composed(routing, *offset)
            expected = F.linear(x, matrix.T if transposed else matrix, own)
            assert_close(routed_linear(x, rows, weight, offset, transposed), expected, **EXACT)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("form", [plain_deltas, sparse])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_chunks_change_nothing(monkeypatch, form, transposed, at_once):
    (x, routing), (weight, offset) = inputs(), layer(form, "moved", transposed)
    whole = routed_linear(x, routing, weight, offset, transposed)
    expected = torch.autograd.grad(whole.square().sum(), (x, routing))
    monkeypatch.setattr(routed, "CHUNK_BYTES", {"cpu": at_once * weight[0].nbytes + 1})
    assert len(routed._chunks(x, weight[0])) == -(-GROUPS // at_once)
    parts = routed_linear(x, routing, weight, offset, transposed)
    assert torch.equal(parts, whole)
    for own, other in zip(torch.autograd.grad(parts.square().sum(), (x, routing)), expected, strict=True):
        assert_close(own, other, **EXACT)


@pytest.mark.parametrize("form", [plain_deltas, low_rank, sparse])
def test_a_gradient_that_nobody_asks_for_is_not_computed(form):
    (x, routing), (weight, offset) = inputs(), layer(form, "moved", False)
    routed_linear(x.detach(), routing, weight, offset).sum().backward()
    assert x.grad is None
    routed_linear(x, routing.detach(), weight, offset).sum().backward()
    expected = torch.autograd.grad(loop(x, routing, weight, offset, False).sum(), (x, routing))
    assert_close([x.grad, routing.grad], list(expected), **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_no_groups(form):
    (x, routing), (weight, offset) = inputs(), layer(form, "moved", False)
    result = routed_linear(x[:0], routing[:0], weight, offset)
    assert result.shape == (0, ROWS, OUT)
    result.sum().backward()


@pytest.mark.parametrize("form", [plain_deltas, sparse])
def test_no_composed_weight_is_saved(form):
    (x, routing), (weight, offset) = inputs(), layer(form, "moved", False)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        routed_linear(x, routing, weight, offset)
    assert (GROUPS, OUT, INTO) not in shapes
    assert (TASKS, OUT, INTO) not in shapes


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_multiplies_in_half_precision_and_composes_in_full(form, transposed):
    def single(deltas):
        return None if deltas is None else deltas.float() if isinstance(deltas, Tensor) else deltas.map(Tensor.float)

    (x, routing), (weight, offset) = inputs(), layer(form, "moved", transposed)
    weight, offset = ((base.float(), single(deltas)) for base, deltas in (weight, offset))
    x, routing = x.detach().float().requires_grad_(), routing.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        half = routed_linear(x, routing, weight, offset, transposed)
    assert half.dtype == torch.bfloat16
    full = routed_linear(x, routing, weight, offset, transposed)
    assert full.dtype == torch.float32
    assert_close(half.float(), full, rtol=0.03, atol=0.1)
    own = torch.autograd.grad(half.float().sum(), (x, routing))
    for mine, theirs in zip(own, torch.autograd.grad(full.sum(), (x, routing)), strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, rtol=0.05, atol=0.5)


def test_autocast_leaves_double_precision_alone_as_torch_does():
    (x, routing), (weight, offset) = inputs(), layer(plain_deltas, "moved", False)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight[0]).dtype == torch.float64
        assert routed_linear(x, routing, weight, offset).dtype == torch.float64
