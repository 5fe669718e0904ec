"""Pruning: what lies above a quantile, in less memory."""

import pytest
import torch

from adamerge import InputError, TaskVectors
from adamerge.deltas import Sparse, dense
from adamerge.rules import Prune


def vectors(deltas: torch.Tensor) -> TaskVectors:
    base = {"w": torch.zeros_like(deltas[0])}
    return TaskVectors.from_state_dicts(base, {str(k): {"w": delta} for k, delta in enumerate(deltas)})


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.25, 0.3, 0.7, 0.8, 0.95])
@pytest.mark.parametrize("shape", [(7,), (10,), (11,), (101,), (9, 9, 5)], ids=str)
def test_what_lies_above_the_quantile_stays(keep, shape):
    values = torch.randn(3, *shape, dtype=torch.float64)
    after = Prune(keep)(vectors(values)).deltas["w"]
    assert isinstance(after, Sparse)
    for delta, value in zip(after, values, strict=True):
        # Just above it: where the quantile is a value, rounding decides on which side of itself it lies.
        quantile = value.abs().quantile(1 - keep) * (1 + 1e-12)
        assert torch.equal(delta, torch.where(value.abs() > quantile, value, 0))


@pytest.mark.parametrize("sparse", [True, False])
def test_everything_can_be_kept(sparse):
    values = torch.tensor([[1.0, 0.0, -2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    after = Prune(1, sparse)(vectors(values)).deltas["w"]
    assert isinstance(after, Sparse) == sparse
    assert torch.equal(dense(after), values)


def test_a_tenth_takes_less_than_a_quarter_of_the_memory():
    values = torch.randn(4, 100, 200)
    after = Prune(0.1)(vectors(values)).deltas["w"]
    assert after.nbytes < values.nbytes / 4
    assert sum(after.counts) == 4 * 2000
    assert Prune(0.1, sparse=False)(vectors(values)).deltas["w"].nbytes == values.nbytes


def test_every_expert_and_tensor_has_its_own_quantile():
    base = {"small": torch.zeros(4), "large": torch.zeros(4)}
    ramp = torch.arange(1.0, 5.0)
    experts = {"a": {"small": ramp / 100, "large": ramp}, "b": {"small": -ramp / 10, "large": -ramp.flip(0)}}
    after = Prune(0.5)(TaskVectors.from_state_dicts(base, experts))
    assert (after.deltas["small"].dense() != 0).tolist() == [[False, False, True, True]] * 2
    assert (after.deltas["large"].dense() != 0).tolist() == [[False, False, True, True], [True, True, False, False]]


def test_a_scalar_stays():
    assert Prune(0.1)(vectors(torch.tensor([1.0, -2.0]))).deltas["w"].dense().tolist() == [1.0, -2.0]


@pytest.mark.slow
def test_a_tensor_of_more_elements_than_torch_takes_quantiles_of():
    values = torch.randperm(2**24 + 1024).to(torch.float32).view(1, -1, 1024)
    after = Prune(0.25)(vectors(values)).deltas["w"]
    assert abs(after.counts[0] - values.numel() / 4) <= 2


@pytest.mark.parametrize("keep", [0.0, 1.1])
def test_a_share_is_wanted(keep):
    with pytest.raises(InputError, match=f"expected 0 < keep <= 1 in Prune, got {keep}"):
        Prune(keep)


def test_only_the_named_tensors_are_pruned():
    base = {"mlp.w": torch.zeros(50), "attn.w": torch.zeros(50)}
    expert = {name: torch.randn(50) for name in base}
    after = Prune(0.1, only="mlp")(TaskVectors.from_state_dicts(base, {"a": expert}))
    assert int((dense(after.deltas["mlp.w"]) != 0).sum()) == 5
    assert torch.equal(dense(after.deltas["attn.w"])[0], expert["attn.w"])
