"""Compressed deltas against their dense form: the same sums, products and gradients in less memory."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adamerge import InputError
from adamerge.deltas import Deltas, LowRank, Sparse, dense, mapped
from adamerge.ops import inner, weighted, weighted_sum
from adamerge.packed import Packed, pack, unpack
from adamerge.stored import Stored

MATRICES = [(4, 7), (7, 4), (3, 2, 2, 2), (1, 5)]
SHAPES = [(), (5,), *MATRICES, (0, 3)]
TASKS = 3


def low_rank(shape: tuple[int, ...], rank: int = 2) -> LowRank:
    rows, columns = shape[0], math.prod(shape[1:])
    left, right = torch.randn(TASKS, rows, rank).double(), torch.randn(TASKS, rank, columns).double()
    return LowRank(left, right, torch.Size((TASKS, *shape)))


def sparse(shape: tuple[int, ...]) -> Sparse:
    values = torch.randn(TASKS, *shape, dtype=torch.float64)
    return Sparse.from_dense(torch.where(values.abs() > 0.8, values, 0))


def bits(shape: tuple[int, ...]) -> torch.Tensor:
    return pack(torch.rand(TASKS, *shape) > 0.4)


def shared(shape: tuple[int, ...]) -> Packed:
    return Packed(torch.randn(TASKS).double(), torch.Size((TASKS, *shape)), torch.randn(shape).double())


def masked(shape: tuple[int, ...]) -> Packed:
    values = torch.randn(shape).double()
    return Packed(torch.randn(TASKS).double(), torch.Size((TASKS, *shape)), values, bits(shape))


def signs(shape: tuple[int, ...]) -> Packed:
    return Packed(torch.randn(TASKS).double(), torch.Size((TASKS, *shape)), signs=bits(shape))


def ternary(shape: tuple[int, ...]) -> Packed:
    return Packed(torch.randn(TASKS).double(), torch.Size((TASKS, *shape)), masks=bits(shape), signs=bits(shape))


def rounded(shape: tuple[int, ...]) -> Stored:
    return Stored.from_dense(torch.randn(TASKS, *shape).double(), torch.bfloat16)


def bytewise(shape: tuple[int, ...]) -> Stored:
    return Stored.from_dense(torch.randn(TASKS, *shape).double(), torch.int8)


MAKERS = (
    (low_rank, MATRICES),
    *((make, SHAPES) for make in (sparse, shared, masked, signs, ternary, rounded, bytewise)),
)
CASES = [pytest.param(make, shape, id=f"{make.__name__}-{shape}") for make, shapes in MAKERS for shape in shapes]
FORMS = [pytest.param(make, id=make.__name__) for make, _ in MAKERS]


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_the_dense_form_is_its_rows(make, shape):
    deltas = make(shape)
    whole = deltas.dense()
    assert whole.shape == deltas.shape == (TASKS, *shape)
    assert len(deltas) == TASKS
    for k, delta in enumerate(deltas):
        assert delta.shape == shape
        assert torch.equal(delta, whole[k])
    assert torch.equal(deltas[-1], whole[-1])
    with pytest.raises(IndexError):
        deltas[TASKS]


@pytest.mark.parametrize("groups", [(), (1,), (5,), (0,)], ids=str)
@pytest.mark.parametrize(("make", "shape"), CASES)
def test_sums_are_those_of_the_dense_form(make, shape, groups):
    deltas = make(shape)
    coefficients = torch.randn(*groups, TASKS, dtype=torch.float64)
    expected = torch.einsum("...k,kn->...n", coefficients, deltas.dense().reshape(TASKS, math.prod(shape)))
    for form in (deltas, deltas.dense()):
        result = weighted(coefficients, form)
        assert result.shape == (*groups, *shape)
        assert_close(result, expected.reshape((*groups, *shape)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("groups", [(), (1,), (5,), (0,)], ids=str)
@pytest.mark.parametrize(("make", "shape"), CASES)
def test_inner_products_are_those_of_the_dense_form(make, shape, groups):
    deltas = make(shape)
    grad = torch.randn((*groups, *shape), dtype=torch.float64)
    flat = grad.reshape(*groups, math.prod(shape))
    expected = torch.einsum("...n,kn->...k", flat, deltas.dense().reshape(TASKS, math.prod(shape)))
    for form in (deltas, deltas.dense()):
        result = inner(grad, form)
        assert result.shape == (*groups, TASKS)
        assert_close(result, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("make", FORMS)
def test_a_gradient_that_is_no_contiguous_tensor(make):
    deltas = make((4, 7))
    for grad in (torch.randn(7, 4).double().T, torch.randn(7, 4, 5).double().permute(2, 1, 0)):
        assert_close(inner(grad, deltas), inner(grad.contiguous(), deltas.dense()), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("groups", [(), (2,)], ids=["one", "groups"])
@pytest.mark.parametrize(("make", "shape"), CASES)
def test_the_gradient_of_the_weighted_sum_passes_gradcheck(make, shape, groups):
    base, deltas = torch.randn(shape, dtype=torch.float64), make(shape)
    coefficients = torch.randn(*groups, TASKS, dtype=torch.float64, requires_grad=True)
    for form in (deltas, deltas.dense()):
        assert torch.autograd.gradcheck(lambda values, form=form: weighted_sum(values, base, form), (coefficients,))


@pytest.mark.parametrize("make", FORMS)
def test_groups_are_one_weighted_sum_each(make):
    base, deltas = torch.randn(4, 7).double(), make((4, 7))
    coefficients = torch.randn(5, TASKS, dtype=torch.float64)
    together = weighted_sum(coefficients, base, deltas)
    for row, merged in zip(coefficients, together, strict=True):
        assert_close(merged, weighted_sum(row, base, deltas), rtol=1e-13, atol=1e-13)
    assert torch.equal(weighted_sum(torch.zeros(2, TASKS), base, deltas), base.expand(2, -1, -1))


@pytest.mark.parametrize("form", ["dense", "low rank", "sparse"])
def test_autocast_does_not_round_what_is_merged(form):
    values = torch.randn(TASKS, 8, 8)
    forms = {"dense": lambda: values, "low rank": lambda: LowRank.from_dense(values, 2)}
    deltas = forms.get(form, lambda: Sparse.from_dense(values))()
    coefficients, grad = torch.randn(2, TASKS), torch.randn(2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = weighted(coefficients, deltas), inner(grad, deltas)
    for result, expected in zip(rounded, (weighted(coefficients, deltas), inner(grad, deltas)), strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)


@pytest.mark.parametrize("make", FORMS)
def test_nothing_is_kept_for_the_backward_pass(make):
    saved: list[torch.Tensor] = []
    coefficients = torch.ones(2, TASKS, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        weighted_sum(coefficients, torch.zeros(4, 7).double(), make((4, 7)))
    assert saved == []


# -- as part of a module -----------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """Moves deltas as a merged model does."""

    def __init__(self, deltas) -> None:
        super().__init__()
        self.deltas = deltas

    def _apply(self, fn, recurse=True):
        self.deltas = mapped(fn, self.deltas)
        return super()._apply(fn, recurse)


@pytest.mark.parametrize("make", [*FORMS, pytest.param(lambda shape: sparse(shape).dense(), id="dense")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_module_moves_them_to_another_dtype(make, dtype):
    deltas = make((4, 7))
    before = copy.deepcopy(deltas)
    moved = Holder(deltas).to(dtype).deltas
    assert moved.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(dense(moved).double(), dense(deltas), rtol=8 * eps, atol=8 * eps)
    assert deltas.dtype == torch.float64, "the argument was changed"
    assert torch.equal(dense(deltas), dense(before))


def test_positions_stay_integers_whatever_is_done_to_the_values():
    deltas = Sparse.from_dense(torch.eye(3000).unsqueeze(0))
    for fn in (lambda values: values.half(), lambda values: values.to(torch.bfloat16), torch.Tensor.double):
        moved = deltas.map(fn)
        assert moved.indices.dtype == torch.int32
        assert torch.equal(moved.dense().float(), deltas.dense())


@pytest.mark.parametrize("make", FORMS)
def test_the_device_of_the_values_takes_the_rest_along(make):
    moved = mapped(lambda tensor: tensor.to("meta"), make((4, 7)))
    assert moved.device == torch.device("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("make", FORMS)
def test_a_gpu_gives_the_same(make):
    deltas = make((40, 70))
    there = mapped(lambda tensor: tensor.cuda(), deltas)
    coefficients, grad = torch.randn(5, TASKS).double(), torch.randn(5, 40, 70).double()
    assert_close(weighted(coefficients.cuda(), there).cpu(), weighted(coefficients, deltas), rtol=1e-12, atol=1e-12)
    assert_close(inner(grad.cuda(), there).cpu(), inner(grad, deltas), rtol=1e-12, atol=1e-12)


# -- made from dense ones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_deltas_keep_every_bit(shape):
    values = torch.randn(TASKS, *shape).relu()
    deltas = Sparse.from_dense(values)
    assert torch.equal(deltas.dense(), values)
    assert deltas.dtype == values.dtype
    assert deltas.any() == bool(values.any())


def test_sparse_deltas_take_eight_bytes_an_entry():
    values = torch.randn(TASKS, 100, 100)
    kept = torch.where(values.abs() > values.abs().quantile(0.9), values, 0)
    assert Sparse.from_dense(kept).nbytes == 8 * int(kept.count_nonzero())
    assert Sparse.from_dense(kept).nbytes < values.nbytes / 4


def test_an_expert_without_entries_counts_as_zeros():
    deltas = Sparse.from_dense(torch.stack([torch.zeros(5), torch.ones(5)]))
    assert deltas.counts == (0, 5)
    assert weighted(torch.tensor([2.0, 3.0]), deltas).tolist() == [3.0] * 5
    assert inner(torch.ones(5), deltas).tolist() == [0.0, 5.0]
    assert not Sparse.from_dense(torch.zeros(2, 5)).any()


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_deltas_are_the_truncated_decomposition(shape, rank):
    values = torch.randn(TASKS, *shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(values.flatten(2), full_matrices=False)
    rank = min(rank, s.shape[1])
    expected = (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
    deltas = LowRank.from_dense(values, rank)
    assert deltas.left.shape[-1] == deltas.right.shape[1] == rank
    assert_close(deltas.dense(), expected.view_as(values), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_the_whole_rank_is_exact(shape):
    values = torch.randn(TASKS, *shape, dtype=torch.float64)
    deltas = LowRank.from_dense(values, min(shape[0], math.prod(shape[1:])))
    assert_close(deltas.dense(), values, rtol=0, atol=1e-12)


def test_small_singular_values_survive_in_float32():
    u, v = (torch.linalg.qr(torch.randn(20, 20).double()).Q for _ in range(2))
    values = (u @ torch.logspace(0, -6, 20).double().diag() @ v).float()
    error = LowRank.from_dense(values.unsqueeze(0), 19)[0] - values
    assert error.norm() < 3e-6


def test_low_rank_deltas_hold_their_factors_alone():
    deltas = LowRank.from_dense(torch.randn(TASKS, 60, 40), 4)
    assert deltas.nbytes == TASKS * 4 * (60 + 40) * 4
    held = sum(factor.untyped_storage().nbytes() for factor in (deltas.left, deltas.right))
    assert held == deltas.nbytes


def test_zeros_decompose():
    deltas = LowRank.from_dense(torch.zeros(TASKS, 4, 5), 2)
    assert not deltas.any()
    assert not deltas.dense().any()


def test_a_decomposition_that_fails_is_tried_again_and_then_named(monkeypatch):
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    values = torch.randn(TASKS, 4, 6)
    expected = LowRank.from_dense(values, 2)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    failed = pytest.warns(UserWarning, match=r"weight: no eigendecomposition of its Gram matrix was found")
    with failed:
        assert_close(LowRank.from_dense(values, 2, "mlp.weight").dense(), expected.dense())
    monkeypatch.setattr(torch.linalg, "svd", fail)
    with failed, pytest.raises(InputError, match=r"mlp\.weight has no singular value decomposition here"):
        LowRank.from_dense(values, 2, "mlp.weight")


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
def test_bits_come_back_from_bytes(count):
    values = torch.rand(2, count) > 0.5
    packed = pack(values)
    assert packed.shape == (2, math.ceil(count / 8))
    for row, found in zip(values, packed, strict=True):
        assert unpack(found, count).tolist() == row.tolist()


def test_the_first_bit_is_the_lowest():
    assert pack(torch.tensor([[True, False, True, False, False, False, False, False, False, True]])).tolist() == [
        [5, 2]
    ]


def test_packed_deltas_are_number_times_shared_times_mask_times_sign():
    kept, plus = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool(), torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    scales, values = torch.tensor([2.0, 10.0]), torch.tensor([1.0, 3.0, 5.0])
    deltas = Packed(scales, torch.Size((2, 3)), values, pack(kept), pack(plus))
    assert deltas.dense().tolist() == [[2, 0, -10], [-10, 30, 0]]
    assert Packed(scales, torch.Size((2, 3)), values, pack(kept)).dense().tolist() == [[2, 0, 10], [10, 30, 0]]
    assert Packed(scales, torch.Size((2, 3)), signs=pack(plus)).dense().tolist() == [[2, 2, -2], [-10, 10, 10]]
    assert Packed(scales, torch.Size((2, 3)), values).dense().tolist() == [[2, 6, 10], [10, 30, 50]]


def test_a_bit_takes_an_eighth_of_a_byte():
    shape = torch.Size((3, 40, 50))
    plane = pack(torch.rand(shape) > 0.5)
    assert Packed(torch.ones(3), shape, signs=plane).nbytes == 3 * 4 + 3 * 250
    assert Packed(torch.ones(3), shape, torch.ones(40, 50), plane).nbytes == 3 * 4 + 2000 * 4 + 3 * 250
    assert Packed(torch.ones(3), shape, masks=plane, signs=plane).nbytes == 3 * 4 + 2 * 3 * 250


def test_masks_that_miss_what_is_shared_leave_nothing():
    values, kept = torch.tensor([0.0, 1.0]), torch.tensor([[True, False]] * 2)
    assert not Packed(torch.ones(2), torch.Size((2, 2)), values, pack(kept)).any()
    assert Packed(torch.ones(2), torch.Size((2, 2)), values, pack(~kept)).any()


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(InputError, match=rf"mlp.weight: rank {rank} for deltas .* expected 1 to 4"):
        LowRank.from_dense(torch.randn(2, 4, 6), rank, "mlp.weight")


def test_a_vector_has_no_rank():
    with pytest.raises(InputError, match="expected a matrix"):
        LowRank.from_dense(torch.randn(2, 4), 1)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"factors of shapes \[2, 4, 3\] and \[2, 2, 5\] do not make"):
        LowRank(torch.ones(2, 4, 3), torch.ones(2, 2, 5))
    with pytest.raises(InputError, match=r"deltas of shape \[2, 4, 6\]"):
        LowRank(torch.ones(2, 4, 3), torch.ones(2, 3, 5), torch.Size((2, 4, 6)))


def test_positions_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"do not make sparse deltas of shape \[2, 4\]"):
        Sparse(torch.arange(3), torch.ones(3), (1, 1), torch.Size((2, 4)))


@pytest.mark.parametrize(
    "parts",
    [
        {"scales": torch.ones(3)},
        {"scales": torch.ones(2), "shared": torch.ones(3, 3)},
        {"scales": torch.ones(2), "masks": torch.zeros(2, 2, dtype=torch.uint8)},
    ],
    ids=lambda parts: list(parts)[-1],
)
def test_packed_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(InputError, match=r"do not make packed deltas of shape \[2, 3\]"):
        Packed(shape=torch.Size((2, 3)), **parts)


@pytest.mark.parametrize("make", FORMS)
def test_as_many_coefficients_as_experts_are_wanted(make):
    with pytest.raises((ValueError, RuntimeError)):
        weighted(torch.ones(TASKS + 1), make((4, 7)))


def test_all_forms_are_deltas():
    assert all(isinstance(make((4, 7)), Deltas) for make, _ in MAKERS)
