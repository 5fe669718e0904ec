"""Deltas in fewer bits and elsewhere: how far they are from what they were, where they are, and what sums need."""

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import adamerge.stored
from adamerge import InputError, TaskVectors
from adamerge.ops import column_sum, inner, weighted
from adamerge.rules import Prune, Store, transform
from adamerge.stored import SHARE, Stored, ahead
from modules import Coefficients, MergedModel

DTYPES = ("same", "bfloat16", "int8")
PLACES = ("memory", "host", "disk")


def stored(values: torch.Tensor, folder, dtype: str = "bfloat16", place: str = "memory") -> Stored:
    base = {"w": torch.zeros(values.shape[1:])}
    vectors = TaskVectors(base, {"w": values}, tuple(map(str, range(len(values)))), fingerprints={})
    return Store(dtype, place, str(folder))(vectors).deltas["w"]


@pytest.mark.parametrize("place", PLACES)
def test_bfloat16_is_the_nearest(tmp_path, place):
    values = torch.randn(3, 40, 50)
    assert torch.equal(stored(values, tmp_path, "bfloat16", place).dense(), values.bfloat16().float())


def test_eight_bits_are_within_half_a_step_of_the_largest_of_their_share(tmp_path):
    values = torch.randn(3, 1000) * torch.logspace(-6, 2, 1000)
    error = (stored(values, tmp_path, "int8").dense() - values).abs()
    for share, off in zip(values.split(SHARE, 1), error.split(SHARE, 1), strict=True):
        assert (off <= share.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all()


def test_bytes_that_are_held(tmp_path):
    values = torch.randn(3, 10 * SHARE)
    assert stored(values, tmp_path, "bfloat16").nbytes == values.nbytes / 2
    assert stored(values, tmp_path, "int8").nbytes == values.numel() + 4 * 3 * 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["host", "disk"])
def test_sums_block_by_block_are_those_of_the_whole(tmp_path, monkeypatch, dtype, place):
    monkeypatch.setattr(adamerge.stored, "CACHE", 2 * SHARE)
    deltas = stored(torch.randn(3, 17, 53, dtype=torch.float64), tmp_path, dtype, place)
    whole, rows, grads = deltas.dense(), torch.randn(2, 3).double(), torch.randn(2, 17, 53).double()
    for row, grad in ((rows, grads), (rows[0], grads[0])):
        assert_close(weighted(row, deltas), weighted(row, whole), rtol=1e-13, atol=1e-13)
        assert_close(inner(grad, deltas), inner(grad, whole), rtol=1e-13, atol=1e-13)
    columns, base = torch.randn(53, 3).double(), torch.zeros(17, 53).double()
    assert_close(column_sum(columns, base, deltas), column_sum(columns, base, whole), rtol=1e-13, atol=1e-13)


def test_a_sum_needs_a_block_and_no_more(tmp_path):
    """The largest tensor that a weighted sum and its gradient make, but for what comes out."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            fresh = isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.dim() == 2
            if fresh and len(result) == 4:
                self.seen = max(self.seen, result.untyped_storage().nbytes())
            return result

    deltas = stored(torch.randn(4, 1000, 1000), tmp_path, "int8", "disk")
    with Largest() as largest:
        inner(weighted(torch.ones(4), deltas), deltas)
    assert 0 < largest.seen <= 4 * adamerge.stored.CACHE


def test_files_have_no_name(tmp_path):
    deltas = stored(torch.randn(3, 40, 50), tmp_path, "int8", "disk")
    assert list(tmp_path.iterdir()) == []
    assert deltas.dense().any()


@pytest.mark.parametrize("place", PLACES)
def test_what_stays_stays_where_a_model_is_moved(tmp_path, place):
    moved = stored(torch.randn(3, 40, 50), tmp_path, "int8", place).map(lambda tensor: tensor.to("meta"))
    assert moved.device.type == "meta"
    assert moved.values.device.type == ("meta" if place == "memory" else "cpu")
    assert moved.map(lambda tensor: tensor.double()).dtype == torch.float64


def test_blocks_keep_their_order_on_their_way():
    parts = [(torch.tensor(n), None) for n in range(5)]
    assert [int(part[0]) for part in ahead(parts, torch.device("cpu"))] == list(range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_computes_with_what_the_host_keeps(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(adamerge.stored, "TRANSFER", 4 * SHARE)
    here = stored(torch.randn(3, 170, 53), tmp_path, dtype, "host")
    there = here.map(lambda tensor: tensor.cuda())
    rows, grad = torch.randn(2, 3), torch.randn(2, 170, 53)
    assert there.values.device.type == "cpu"
    assert_close(weighted(rows.cuda(), there).cpu(), weighted(rows, here), rtol=1e-4, atol=1e-4)
    assert_close(inner(grad.cuda(), there).cpu(), inner(grad, here), rtol=1e-3, atol=1e-2)


def test_files_are_read_one_tensor_at_a_time(base, experts, tmp_path):
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    lazy = TaskVectors.open(tmp_path / "base.safetensors", {task: tmp_path / f"{task}.safetensors" for task in experts})
    after = Store()(lazy)
    assert after.lazy
    assert isinstance(after.load().deltas["0.weight"], Stored)
    assert after.load().fingerprints == TaskVectors.from_state_dicts(base, experts).fingerprints


def test_what_is_small_already_stays_as_it_is(base, experts):
    pruned = transform(TaskVectors.from_state_dicts(base, experts), [Prune(0.3)])
    after = Store("int8", "disk")(pruned)
    assert all(after.deltas[name] is pruned.deltas[name] for name in pruned.deltas)


@pytest.mark.parametrize("place", PLACES)
def test_a_merged_model_learns_from_them(model, base, experts, tmp_path, place):
    vectors = transform(TaskVectors.from_state_dicts(base, experts), [Store("bfloat16", place, str(tmp_path))])
    rounded = {name: delta.dense() for name, delta in vectors.deltas.items()}
    plain = TaskVectors(base, rounded, vectors.tasks, fingerprints={})
    images, grads = torch.randn(5, 6).double(), []
    for tv in (vectors, plain):
        merged = MergedModel(model, tv, Coefficients())
        merged(images).square().sum().backward()
        grads.append(merged.coefficients.raw.grad)
    assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"Store\(dtype='int4', place='memory'\): there is no such form"):
        Store("int4")
    with pytest.raises(InputError, match=r"do not make deltas of shape \[2, 3\]"):
        Stored(torch.zeros(2, 4), torch.Size((2, 3)))
