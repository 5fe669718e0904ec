"""Sens-Merging's coefficients by hand."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.agreement import with_agreement
from adamerge.observing import Observation
from adamerge.rules import SensMerging
from adamerge.statistics import Statistics, collect


def test_coefficients_by_hand():
    names = ("a.0.w", "a.0.b", "a.1.w")
    base = {name: torch.zeros(1, dtype=torch.float64) for name in names}
    experts = {task: {name: torch.ones(1, dtype=torch.float64) for name in names} for task in "xy"}
    one = {
        "sensitivity/a.0.w": 1.0,
        "sensitivity/a.0.b": 2.0,
        "sensitivity/a.1.w": 4.0,
        "agreement/y": 0.5,
        "agreement/x": 1.0,
    }
    two = {"sensitivity/a.0.w": 6.0, "sensitivity/a.1.w": 8.0, "agreement/x": 0.2, "agreement/y": 1.0}
    statistics = Statistics(
        {t: Observation({k: torch.tensor(v) for k, v in each.items()}) for t, each in (("x", one), ("y", two))}
    )
    found = SensMerging(statistics, temperature=0.5)(TaskVectors.from_state_dicts(base, experts)).deltas
    x, y = math.exp(0.5 / 0.5), math.exp(0.2 / 0.5)
    shares, rms = (2 * x / (x + y), 2 * y / (x + y)), (math.sqrt((9 + 16) / 2), math.sqrt((36 + 64) / 2))
    for name, sensitivity in {"a.0.w": (3, 6), "a.0.b": (3, 6), "a.1.w": (4, 8)}.items():
        expected = [s * v / r for s, v, r in zip(shares, sensitivity, rms, strict=True)]
        assert found[name].flatten().tolist() == pytest.approx(expected)


def test_agreement_is_the_mean_cosine_of_logits():
    torch.manual_seed(0)
    experts = {task: nn.Linear(2, 3).state_dict() for task in "xy"}
    data = {task: torch.randn(5, 2) for task in "xy"}
    batches = {task: lambda task=task: data[task].split(2) for task in "xy"}
    found = with_agreement(collect(nn.Linear(2, 3), experts, batches), nn.Linear(2, 3), experts, batches)
    cosines = []
    for sample in data["y"]:
        u, v = (experts[task]["weight"] @ sample + experts[task]["bias"] for task in "xy")
        cosines.append(float(u @ v / (u.norm() * v.norm())))
    assert float(found.find("agreement", "x", "y")) == pytest.approx(sum(cosines) / 5, rel=1e-5)
    assert float(found.find("agreement", "x", "x")) == 1
    assert found.find("gram", "x", "weight") is not None


def test_sensitivity_is_that_of_the_mean_loss():
    model = nn.Linear(2, 2).double()
    x, labels = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    state = {"task": model.state_dict()}
    found = collect(
        model, state, {"task": lambda: [(x[:3], labels[:3]), (x[3:], labels[3:])]}, ("sensitivity",), "labels"
    )
    nn.functional.cross_entropy(model(x), labels).backward()
    for name, parameter in model.named_parameters():
        assert_close(found.find("sensitivity", "task", name), (parameter * parameter.grad).sum().abs().detach())


def test_what_is_missing_is_said():
    with pytest.raises(InputError, match="temperature > 0"):
        SensMerging(temperature=0.0)
    observation = Observation({"sensitivity/w": torch.tensor(1.0), "agreement/x": torch.tensor(1.0)})
    vectors = TaskVectors.from_state_dicts({"w": torch.zeros(1)}, {t: {"w": torch.ones(1)} for t in "xy"})
    with pytest.raises(InputError, match="agreement of 'x' with all of x, y"):
        merge(vectors, [SensMerging(Statistics(dict.fromkeys("xy", observation)))])
