"""Weighted averages, norms and extrapolation, counted by hand."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Expo, Linear, Mean, MetaGpt, Trim


@pytest.mark.parametrize("weights", [[3.0, 1.0, -0.5], {"signs": -0.5, "digits": 3.0, "letters": 1.0}], ids=str)
def test_a_weighted_average_of_the_weights(tv, experts, weights):
    merged, plain = merge(tv, [Linear(weights)]), merge(tv, [Linear(weights, normalize=False)])
    for name in tv.base:
        total = 3 * experts["digits"][name] + experts["letters"][name] - 0.5 * experts["signs"][name]
        assert_close(merged[name], total / 3.5, rtol=0, atol=1e-14)
        assert_close(plain[name], total, rtol=0, atol=1e-14)


def test_one_weight_for_all_is_the_mean_or_a_multiple_of_the_sum(tv, experts):
    assert_close(merge(tv, [Linear(7.0)]), merge(tv, [Mean()]), rtol=0, atol=1e-14)
    summed = merge(tv, [Linear(0.25, normalize=False)])
    for name in tv.base:
        assert_close(summed[name], 0.25 * sum(expert[name] for expert in experts.values()), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Linear([1.0, 2.0]), "Linear has 2 weights for 3 experts: digits, letters, signs"),
        (Linear({"digits": 1.0}), r"Linear has weights for \['digits'\], the experts are \['digits', 'letters', "),
        (Linear([1.0, -2.0, 1.0]), r"the weights of Linear, \[1.0, -2.0, 1.0\], sum to 0"),
        (Linear(float("nan"), normalize=False), "expected finite numbers"),
        (Expo(), "Expo takes 1 expert, got 3: digits, letters, signs"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(tv, rule, message):
    with pytest.raises(InputError, match=message):
        merge(tv, [rule])


def test_weights_that_sum_to_zero_are_fine_where_they_are_not_normalised(tv, experts):
    merged = merge(tv, [Linear([1.0, -2.0, 1.0], normalize=False)])["0.bias"]
    expected = experts["digits"]["0.bias"] - 2 * experts["letters"]["0.bias"] + experts["signs"]["0.bias"]
    assert_close(merged, expected, rtol=0, atol=1e-14)


def test_a_merge_of_weights_takes_no_transforms(tv):
    with pytest.raises(InputError, match="Linear merges the experts' weights, not their task vectors: Trim before it"):
        merge(tv, [Trim(), Linear()])


def test_metagpt_weighs_by_the_squared_norms_of_all_tensors():
    base = {"u": torch.zeros(2), "v": torch.zeros(1), "bn.running_mean": torch.zeros(1)}
    a = {"u": torch.tensor([1.0, 2.0]), "v": torch.tensor([0.0]), "bn.running_mean": torch.tensor([9.0])}
    b = {"u": torch.tensor([1.0, -1.0]), "v": torch.tensor([3.0]), "bn.running_mean": torch.tensor([0.0])}
    # |a|² = 5, |b|² = 11; running statistics do not count, and are averaged.
    merged = merge(TaskVectors.from_state_dicts(base, {"a": a, "b": b}), [MetaGpt()])
    assert_close(merged["u"], torch.tensor([16 / 16, -1 / 16]))
    assert_close(merged["v"], torch.tensor([33 / 16]))
    assert merged["bn.running_mean"] == 4.5


def test_expo_goes_beyond_the_expert(base, experts):
    tv = TaskVectors.from_state_dicts(base, {"signs": experts["signs"]})
    for name, value in merge(tv, [Expo(0.25)]).items():
        expected = experts["signs"][name] + 0.25 * (experts["signs"][name] - base[name])
        assert_close(value, expected, rtol=0, atol=1e-15)
    assert_close(merge(tv, [Expo(-1.0)]), base, rtol=0, atol=0)
