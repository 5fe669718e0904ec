"""Averages, task arithmetic and TIES against a reference implementation: no difference at all in float64."""

import pytest
import torch

from adamerge import TaskVectors, merge
from adamerge.rules import ElectSign, Mean, TaskArithmetic, Trim


@pytest.fixture
def task_vectors(shared) -> TaskVectors:
    inputs = torch.load(shared / "parity/inputs.pt", weights_only=True)
    double = [{name: value.double() for name, value in state.items()} for state in (inputs["base"], *inputs["experts"])]
    return TaskVectors.from_state_dicts(double[0], dict(zip(inputs["tasks"], double[1:], strict=True)))


@pytest.mark.parametrize(
    ("file", "rules", "scale"),
    [
        ("simple_average", [Mean()], 1.0),
        ("task_arithmetic", [TaskArithmetic()], 0.3),
        ("ties_sum_20", [Trim(0.2), ElectSign("sum")], 0.3),
        ("ties_mean_20", [Trim(0.2), ElectSign("mean")], 0.3),
    ],
)
def test_elementwise_merges(shared, task_vectors, file, rules, scale):
    expected = torch.load(shared / f"parity/{file}.pt", weights_only=True)["fp64"]["merged"]
    merged = merge(task_vectors, rules=rules, scale=scale)
    assert set(merged) == set(expected)
    for name, value in merged.items():
        assert value.dtype == torch.float64
        assert torch.equal(value, expected[name]), name
