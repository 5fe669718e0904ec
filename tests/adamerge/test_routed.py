"""Linear layers with weights of their own for every group, against a loop over the groups, in every way there is."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, compositions, routed
from adamerge.compositions import routed_product
from adamerge.deltas import AnyDeltas, LowRank, Sparse, dense
from adamerge.routed import costs, routed_linear

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
WAYS = {
    plain_deltas: ("materialise", "expand"),
    low_rank: ("materialise", "expand", "factorise"),
    sparse: ("materialise", "expand"),
}
FORMS_AND_WAYS = [pytest.param(form, way, id=f"{form.__name__}-{way}") for form, ways in WAYS.items() for way in ways]


def take(monkeypatch, way: str) -> None:
    """Whatever the model of costs says."""
    monkeypatch.setattr(routed, "costs", lambda *_: {way: 0.0})


def inputs() -> tuple[Tensor, Tensor]:
    x, routing = torch.randn(GROUPS, ROWS, INTO), torch.randn(GROUPS, TASKS)
    return x.double().requires_grad_(), routing.double().requires_grad_()


def layer(form, bias: str, transposed: bool, out: int = OUT):
    shape = (INTO, out) if transposed else (out, INTO)
    weight = torch.randn(shape, dtype=torch.float64), form(shape)
    given = {"moved": plain_deltas((out,)), "sparse": sparse((out,)), "same": None}
    return weight, None if bias == "without" else (torch.randn(out, dtype=torch.float64), given[bias])


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
    pytest.param(form, way, bias, transposed, id=f"{form.__name__}-{way}-bias {bias}{'-transposed' * transposed}")
    for form in FORMS
    for way in WAYS.get(form, ("",))
    for bias in ("without", "same", "moved", "sparse")
    for transposed in (False, True)
]


@pytest.mark.parametrize(("form", "way", "bias", "transposed"), CASES)
class TestAgainstALoop:
    @pytest.fixture(autouse=True)
    def way(self, monkeypatch, way):
        take(monkeypatch, way)

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


@pytest.mark.parametrize("asked", ["", "expand", "materialise", "factorise"])
def test_the_environment_names_a_way_where_it_can_be_taken(monkeypatch, asked):
    monkeypatch.setenv("ADAMERGE_COMPOSITION", asked)
    taken = []
    monkeypatch.setattr(routed, "routed_product", lambda *args: taken.append(args[-1]) or routed_product(*args))
    for form in (low_rank, plain_deltas):
        (x, routing), (weight, offset) = inputs(), layer(form, "without", False)
        result = routed_linear(x, routing, weight, offset)
        assert_close(result, loop(x, routing, weight, offset, False), **EXACT)
        price = costs(GROUPS, ROWS, *weight, backward=True)
        assert taken.pop() == (asked if asked in price else min(price, key=price.get))


def test_a_way_that_there_is_not(monkeypatch):
    monkeypatch.setenv("ADAMERGE_COMPOSITION", "materialize")
    with pytest.raises(InputError, match="ADAMERGE_COMPOSITION=materialize: did you mean 'materialise'"):
        routed_linear(*inputs(), layer(plain_deltas, "without", False)[0])


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("out", [INTO - 2, INTO + 2], ids=["narrow", "wide"])
@pytest.mark.parametrize("bytes_", [100, 400, 1000, 1 << 20])
def test_blocks_change_nothing(monkeypatch, transposed, out, bytes_):
    (x, routing), (weight, offset) = inputs(), layer(plain_deltas, "moved", transposed, out)
    take(monkeypatch, "materialise")
    monkeypatch.setattr(compositions, "SCRATCH_BYTES", {"cpu": bytes_})
    monkeypatch.setattr(compositions, "GROUPS_AT_ONCE", 2)
    result, expected = (fn(x, routing, weight, offset, transposed) for fn in (routed_linear, loop))
    assert_close(result, expected, **EXACT)
    own, other = (torch.autograd.grad(y.square().sum(), (x, routing)) for y in (result, expected))
    assert_close(own, other, **EXACT)


@pytest.mark.parametrize(
    ("groups", "experts", "shape"), [(128, 8, (3072, 768)), (3, 64, (768, 3072)), (500, 8, (96, 384))]
)
def test_blocks_fit_in_the_scratch_memory_and_cover_the_matrix_once(groups, experts, shape):
    matrix, deltas = torch.zeros(shape), torch.zeros(1, 1, 1).expand(experts, *shape)
    covered = torch.zeros(max(shape))
    for block, staged, room in compositions._Layer(matrix, deltas, False).blocks(groups):
        covered[block] += 1
        assert staged.nbytes + room.nbytes <= compositions.SCRATCH_BYTES["cpu"]
        assert len(room) >= min(groups, compositions.GROUPS_AT_ONCE)
    assert (covered == 1).all()


def choice(groups: int, rows: int, experts: int, deltas: AnyDeltas | None = None, backward: bool = True) -> str:
    matrix = torch.empty(768, 3072, device="meta")
    deltas = torch.empty(experts, *matrix.shape, device="meta") if deltas is None else deltas
    price = costs(groups, rows, matrix, deltas, backward)
    return min(price, key=price.__getitem__)


@pytest.mark.parametrize("backward", [False, True])
def test_the_way_that_is_taken(backward):
    def factors(rank: int) -> LowRank:
        sizes = (8, 768, rank), (8, rank, 3072)
        return LowRank(*(torch.empty(size, device="meta") for size in sizes))

    assert choice(128, 1, 8, backward=backward) == "expand"  # one row cannot pay for a matrix of its own
    assert choice(128, 50, 8, backward=backward) == "materialise"
    assert choice(128, 50, 64, backward=backward) == "materialise"
    assert choice(128, 50, 8, factors(16), backward) == "factorise"
    assert choice(128, 400, 8, factors(512), backward) == "materialise"  # factors as large as the matrices


def test_the_cheapest_way_is_taken(monkeypatch):
    taken = []

    def product(x, *args):
        taken.append(args[-1])
        return routed_product(x, *args)

    monkeypatch.setattr(routed, "routed_product", product)
    (x, routing), (weight, offset) = inputs(), layer(low_rank, "moved", False)
    for way in ("expand", "materialise", "factorise"):
        prices = {"materialise": 2.0, "expand": 2.0, "factorise": 2.0, way: 1.0}
        monkeypatch.setattr(routed, "costs", lambda *_, prices=prices: prices)
        routed_linear(x, routing, weight, offset)
    assert taken == ["expand", "materialise", "factorise"]


@pytest.mark.parametrize(("form", "way"), FORMS_AND_WAYS)
def test_a_gradient_that_nobody_asks_for_is_not_given(monkeypatch, form, way):
    take(monkeypatch, way)
    (x, routing), (weight, offset) = inputs(), layer(form, "moved", False)
    routed_linear(x.detach(), routing, weight, offset).sum().backward()
    assert x.grad is None
    routed_linear(x, routing.detach(), weight, offset).sum().backward()
    expected = torch.autograd.grad(loop(x, routing, weight, offset, False).sum(), (x, routing))
    assert_close([x.grad, routing.grad], list(expected), **EXACT)


@pytest.mark.parametrize(("form", "way"), [*FORMS_AND_WAYS, pytest.param(none, "", id="none")])
def test_no_groups(monkeypatch, form, way):
    take(monkeypatch, way)
    (x, routing), (weight, offset) = inputs(), layer(form, "moved", False)
    result = routed_linear(x[:0], routing[:0], weight, offset)
    assert result.shape == (0, ROWS, OUT)
    result.sum().backward()


@pytest.mark.parametrize(("form", "way"), FORMS_AND_WAYS)
def test_no_composed_weight_is_saved(monkeypatch, form, way):
    take(monkeypatch, way)
    (x, routing), (weight, offset) = inputs(), layer(form, "moved", False)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        routed_linear(x, routing, weight, offset)
    assert (GROUPS, OUT, INTO) not in shapes
    assert (TASKS, OUT, INTO) not in shapes


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(("form", "way"), [*FORMS_AND_WAYS, pytest.param(none, "", id="none")])
def test_autocast_multiplies_in_half_precision_and_composes_in_full(monkeypatch, form, way, transposed):
    take(monkeypatch, way)

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
