"""Static merging: closed forms and limits, exact where floating point allows."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Mean, TaskArithmetic


def same(left, right) -> bool:
    """Same names in the same order, same dtypes, same bits."""
    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [TaskArithmetic(), Mean()], ids=lambda rule: type(rule).__name__)
def test_scale_zero_is_the_base(tv, base, rule):
    assert same(merge(tv, rules=[rule], scale=0.0), base)


@pytest.mark.parametrize("rule", [TaskArithmetic(), Mean()], ids=lambda rule: type(rule).__name__)
def test_one_expert_at_scale_one_is_the_expert(base, experts, rule):
    for task, expert in experts.items():
        alone = TaskVectors.from_state_dicts(base, {task: expert})
        assert same(merge(alone, rules=[rule], scale=1.0), expert)


def test_the_mean_is_that_of_the_weights(tv, experts):
    states = experts.values()
    expected = {name: sum(state[name] for state in states) / 3 for name in tv.base}
    assert same(merge(tv, rules=[Mean()]), expected)


def test_the_mean_at_half_the_scale_lies_halfway_to_the_base(tv, base):
    mean = merge(tv, rules=[Mean()])
    for name, value in merge(tv, rules=[Mean()], scale=0.5).items():
        assert_close(value, (mean[name] + base[name]) / 2, rtol=0, atol=1e-15)


def test_task_arithmetic_adds_the_scaled_differences(tv, base, experts):
    for name, value in merge(tv, scale=0.3).items():
        expected = base[name] + 0.3 * sum(expert[name] - base[name] for expert in experts.values())
        assert torch.equal(value, expected)


def test_task_arithmetic_is_the_default(tv):
    assert same(merge(tv, scale=0.3), merge(tv, rules=[TaskArithmetic()], scale=0.3))
    assert same(merge(tv), merge(tv, scale=1.0))


def test_identical_experts_average_to_themselves(base, experts):
    tv = TaskVectors.from_state_dicts(base, dict.fromkeys("abcd", experts["digits"]))
    assert same(merge(tv, rules=[Mean()]), experts["digits"])


@given(scale=st.floats(-2, 3))
@settings(max_examples=25, deadline=None)
def test_the_merge_is_linear_in_the_scale(scale):
    base = {"w": torch.linspace(-1, 1, 7, dtype=torch.float64)}
    tv = TaskVectors.from_state_dicts(base, {"a": {"w": base["w"].cos()}, "b": {"w": base["w"].sin()}})
    for rule in (TaskArithmetic(), Mean()):
        whole = merge(tv, rules=[rule])["w"] - base["w"]
        assert_close(merge(tv, rules=[rule], scale=scale)["w"], base["w"] + scale * whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", [TaskArithmetic(), Mean()], ids=lambda rule: type(rule).__name__)
def test_the_order_of_the_experts_is_harmless(base, experts, rule):
    merges = [
        merge(TaskVectors.from_state_dicts(base, {task: experts[task] for task in order}), rules=[rule], scale=0.3)
        for order in itertools.permutations(experts)
    ]
    assert all(same(other, merges[0]) for other in merges[1:])


def test_the_merge_is_in_the_order_of_the_base_and_loads_strictly(tv, model):
    merged = merge(tv, scale=0.3)
    assert list(merged) == list(model.state_dict())
    model.load_state_dict(merged)


def test_the_merge_shares_no_memory_with_its_inputs(base, experts):
    base, experts = {**base, "steps": torch.tensor(1)}, {t: {**e, "steps": torch.tensor(2)} for t, e in experts.items()}
    tv = TaskVectors.from_state_dicts(base, experts)
    inputs = {v.data_ptr() for state in (base, *experts.values(), tv.base, tv.deltas) for v in state.values()}
    for rule in (TaskArithmetic(), Mean()):
        for scale in (0.0, 1.0):
            assert inputs.isdisjoint(v.data_ptr() for v in merge(tv, rules=[rule], scale=scale).values())


@pytest.mark.parametrize("rules", [[], [Mean(), TaskArithmetic()]], ids=["none", "two"])
def test_one_rule_is_wanted(tv, rules):
    with pytest.raises(InputError, match=f"expected one merging rule, got {len(rules)}"):
        merge(tv, rules=rules)


# -- the kinds of tensors ----------------------------------------------------------------------------------------------


def batch_norm(shift: float, counter: int) -> dict[str, torch.Tensor]:
    state = {name: value + shift for name, value in nn.BatchNorm1d(4).double().state_dict().items()}
    return {**state, "num_batches_tracked": torch.tensor(counter), "position_ids": torch.arange(counter, counter + 3)}


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rule", [TaskArithmetic(), Mean()], ids=lambda rule: type(rule).__name__)
def test_integers_are_the_bases_and_statistics_the_experts_mean(rule, scale):
    tv = TaskVectors.from_state_dicts(batch_norm(0, 7), {"a": batch_norm(1, 8), "b": batch_norm(-0.5, 9)})
    merged = merge(tv, rules=[rule], scale=scale)
    assert merged["num_batches_tracked"] == 7
    assert merged["num_batches_tracked"].dtype == torch.int64
    assert merged["position_ids"].tolist() == [7, 8, 9]
    assert merged["running_mean"].tolist() == [0.25] * 4
    assert merged["running_var"].tolist() == [1.25] * 4
    assert merged["weight"].tolist() == [1 + scale * (0.25 if isinstance(rule, Mean) else 0.5)] * 4


def test_the_sum_of_many_experts_keeps_variances_positive():
    tv = TaskVectors.from_state_dicts(batch_norm(0, 0), {str(k): batch_norm(-0.9, 0) for k in range(8)})
    assert (merge(tv)["running_var"] > 0).all()


def test_an_unchanged_tensor_is_the_bases(base, experts):
    base["frozen"] = torch.randn(5)
    tv = TaskVectors.from_state_dicts(base, {t: {**e, "frozen": base["frozen"].clone()} for t, e in experts.items()})
    assert torch.equal(merge(tv, scale=0.3)["frozen"], base["frozen"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_merge_has_the_dtype_of_the_base(base, experts, dtype):
    base = {name: value.to(dtype) for name, value in base.items()}
    merged = merge(TaskVectors.from_state_dicts(base, experts), rules=[Mean()])
    assert {value.dtype for value in merged.values()} == {dtype}
    for name, value in merged.items():
        expected = sum(expert[name] for expert in experts.values()) / 3
        assert_close(value.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
