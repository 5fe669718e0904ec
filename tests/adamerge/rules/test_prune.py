"""Pruning: what lies above a quantile, in less memory."""

import pytest
import torch

from adamerge import InputError, TaskVectors, merge
from adamerge.deltas import Sparse, dense
from adamerge.rules import Breadcrumbs, Cabs, Dare, ElectSign, Prune, Trim


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


# -- Breadcrumbs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "outliers"), [(0.1, 0.01), (0.29, 0.29), (0.5, 0.0), (1.0, 0.0), (0.9, 0.1)])
@pytest.mark.parametrize("shape", [(100,), (20, 10), (7, 5, 3)], ids=str)
def test_the_largest_and_the_smallest_are_dropped(keep, outliers, shape):
    values = torch.randn(2, *shape, dtype=torch.float64)
    after = Breadcrumbs(keep, outliers)(vectors(values)).deltas["w"]
    size = values[0].numel()
    top, kept = round(outliers * size - 0.499), round(keep * size - 0.499)
    for delta, value in zip(after, values, strict=True):
        order = sorted(value.flatten().tolist(), key=abs, reverse=True)
        assert sorted(delta[delta != 0].tolist(), key=abs, reverse=True) == order[top : top + kept]


def test_equal_entries_are_treated_alike():
    values = torch.tensor([[9.0, -3.0, 3.0, 3.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]])
    assert Breadcrumbs(0.2, 0.1)(vectors(values)).deltas["w"].tolist() == [[0, -3, 3, 3, 0, 0, 0, 0, 0, 0]]
    assert Breadcrumbs(0.1, 0.2)(vectors(values)).deltas["w"].tolist() == [[0, -3, 3, 3, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("size", [1, 2, 9, 99])
def test_a_small_tensor_is_not_lost(size):
    values = torch.arange(1.0, size + 1).view(1, -1)
    after = Breadcrumbs(0.001, 0.01)(vectors(values)).deltas["w"]
    assert after.tolist() == [[0.0] * (size - 1) + [size]]
    assert Breadcrumbs()(vectors(torch.tensor([2.0, -1.0]))).deltas["w"].tolist() == [2, -1]


@pytest.mark.parametrize(("keep", "outliers"), [(0.0, 0.1), (1.1, 0.1), (0.1, -0.1), (0.1, 1.0)])
def test_shares_are_wanted(keep, outliers):
    with pytest.raises(InputError, match=rf"in Breadcrumbs, got {keep} and {outliers}"):
        Breadcrumbs(keep, outliers)


# -- CABS --------------------------------------------------------------------------------------------------------------


def test_each_expert_takes_the_largest_that_are_left():
    values = torch.tensor([[5.0, -4.0, 3.0, 2.0, 1.0, 6.0], [-9.0, 8.0, 1.0, 7.0, 2.0, 2.0]])
    after = Cabs(n=1, m=3)(vectors(values)).deltas["w"]
    assert after.tolist() == [[5, 0, 0, 0, 0, 6], [0, 8, 0, 7, 0, 0]]
    other = Cabs(n=1, m=3, order=["1", "0"])(vectors(values)).deltas["w"]
    assert other.tolist() == [[0, -4, 0, 0, 0, 6], [-9, 0, 0, 7, 0, 0]]


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_no_entry_is_changed_by_two_experts(experts):
    values = torch.randn(experts, 6, 16)
    after = Cabs(n=2, m=8)(vectors(values)).deltas["w"]
    assert (after != 0).sum(0).max() == 1
    assert (after != 0).view(experts, 12, 8).sum(-1).unique().tolist() == [2]
    assert torch.equal(after[after != 0], values[after != 0])


def test_a_block_that_is_too_short_has_room_for_its_share():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]).repeat(2, 1)
    after = Cabs(n=2, m=4)(vectors(values)).deltas["w"]
    # Of the last three, each may have ⌈2 · 3 / 4⌉ = 2, and the second finds one left.
    assert after.tolist() == [[0, 0, 3, 4, 0, 6, 7], [1, 2, 0, 0, 5, 0, 0]]
    assert Cabs(n=2, m=8)(vectors(values)).deltas["w"].tolist() == [[0, 0, 0, 0, 0, 6, 7], [0, 0, 0, 4, 5, 0, 0]]
    assert Cabs(n=2, m=16)(vectors(values)).deltas["w"].tolist() == [[0, 0, 0, 0, 0, 0, 7], [0, 0, 0, 0, 0, 6, 0]]
    assert Cabs(n=1, m=4)(vectors(torch.tensor([[3.0], [4.0]]))).deltas["w"].tolist() == [[3], [0]]


def test_what_an_expert_did_not_change_is_left_to_the_others():
    values = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    assert Cabs(n=2, m=4)(vectors(values)).deltas["w"].tolist() == [[1, 0, 0, 0], [0, 0, 3, 4]]


def test_experts_without_room_are_refused():
    with pytest.raises(
        InputError, match=r"Cabs\(n=2, m=5\) has room for 2 experts, there are 3: make n at most 1 or m "
    ):
        Cabs(2, 5)(vectors(torch.ones(3, 10)))


@pytest.mark.parametrize("order", [["0"], ["0", "0"], ["0", "1", "2"], ["a", "b"]], ids=str)
def test_every_expert_has_one_turn(order):
    with pytest.raises(InputError, match=r"order=.* in Cabs: expected each of \['0', '1'\] once"):
        Cabs(1, 2, order)(vectors(torch.ones(2, 10)))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (-1, 4)])
def test_a_pattern_is_wanted(n, m):
    with pytest.raises(InputError, match=f"expected 1 <= n <= m in Cabs, got n={n} and m={m}"):
        Cabs(n, m)


# -- in a list of rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Breadcrumbs(), Cabs(1, 4)], ids=lambda step: type(step).__name__)
def test_magnitudes_are_looked_at_first(step):
    tv, name = vectors(torch.randn(2, 50)), type(step).__name__
    with pytest.raises(InputError, match=f"^{name} after Dare, which has left few entries"):
        merge(tv, rules=[Dare(0.5), step])
    with pytest.raises(InputError, match=f"^{name} after ElectSign drops entries that have voted: put {name} before"):
        merge(tv, rules=[ElectSign(), step])
    for rules in ([step, Dare(0.5)], [step, ElectSign()], [Trim(0.5), step]):
        assert merge(tv, rules=rules)["w"].isfinite().all()
