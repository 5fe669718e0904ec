"""A merge as the base: the experts stay what they are."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import ElectSign, Mean, Rebase, TaskArithmetic, Trim, TruncatedSVD, transform

RULES = [TaskArithmetic(), Mean(), ElectSign("mean")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_base_is_the_merge_and_the_experts_stay(tv, experts, rule):
    after = Rebase(rule, scale=0.4)(tv)
    anchor = merge(tv, rules=[rule], scale=0.4)
    for name, value in anchor.items():
        assert torch.equal(after.base[name], value)
    for task, expert in experts.items():
        for name, value in after.expert(task).items():
            assert_close(value, expert[name], rtol=0, atol=1e-15)


def test_zero_coefficients_are_the_merge(tv):
    zero, anchor = merge(tv, rules=[Rebase(), TaskArithmetic()], scale=0.0), merge(tv, scale=0.3)
    assert all(torch.equal(zero[name], value) for name, value in anchor.items())


def test_scale_zero_leaves_everything_in_place(tv):
    after = Rebase(scale=0.0)(tv)
    assert all(torch.equal(after.deltas[name], delta) for name, delta in tv.deltas.items())
    assert all(torch.equal(after.base[name], value) for name, value in tv.base.items())


def test_an_untouched_tensor_is_the_same_object(base, experts):
    base["frozen"] = torch.rand(5) / 3
    tv = TaskVectors.from_state_dicts(base, {t: {**e, "frozen": base["frozen"].clone()} for t, e in experts.items()})
    after = Rebase(Mean(), scale=1.0)(tv)
    assert after.base["frozen"] is tv.base["frozen"]


def test_statistics_stay_and_experts_keep_theirs():
    state = nn.BatchNorm1d(4).double().state_dict()
    experts = {t: {n: v + k + 1 for n, v in state.items()} for k, t in enumerate("ab")}
    after = Rebase()(TaskVectors.from_state_dicts(state, experts))
    for task, expert in experts.items():
        assert torch.equal(after.expert(task)["running_var"], expert["running_var"])
        assert_close(after.expert(task)["weight"], expert["weight"], rtol=0, atol=1e-15)
    assert merge(after, scale=0.3)["running_var"].tolist() == [2.5] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_experts_come_back_as_they_were(base, experts, dtype):
    halves = [{name: value.to(dtype) for name, value in state.items()} for state in (base, *experts.values())]
    after = Rebase()(TaskVectors.from_state_dicts(halves[0], dict(zip(experts, halves[1:], strict=True))))
    assert {value.dtype for value in after.base.values()} == {dtype}
    assert {delta.dtype for delta in after.deltas.values()} == {torch.float32}
    for task, expert in zip(experts, halves[1:], strict=True):
        assert all(torch.equal(value, expert[name]) for name, value in after.expert(task).items())


def test_the_exclusive_parts_of_twin_merging(tv, base, experts):
    after = transform(tv, [Rebase(scale=0.3), TruncatedSVD(2)])
    anchor = merge(tv, scale=0.3)
    for name in ("0.weight", "2.weight"):
        exact = torch.stack([expert[name] - anchor[name] for expert in experts.values()])
        u, s, v = torch.linalg.svd(exact, full_matrices=False)
        delta = after.deltas[name]
        dense = delta if isinstance(delta, torch.Tensor) else delta.dense()
        assert_close(dense, (u[..., :2] * s[:, None, :2]) @ v[:, :2], rtol=0, atol=1e-12)
        assert torch.equal(after.base[name], anchor[name])


def test_any_transform_may_come_before(tv):
    steps = [Trim(0.5), Rebase()]
    after, trimmed = transform(tv, steps), Trim(0.5)(tv)
    for task in tv.tasks:
        for name, value in trimmed.expert(task).items():
            assert_close(after.expert(task)[name], value, rtol=0, atol=1e-15)


def test_a_scale_in_the_place_of_the_rule_is_named():
    with pytest.raises(InputError, match=r"takes a rule and then a scale, got 0\.1"):
        Rebase(0.1)
