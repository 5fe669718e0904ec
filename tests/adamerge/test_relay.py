"""RegMean++: blocks measured behind the blocks that are merged already."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.relay import collect_through
from adamerge.rules import RegMean, RegMeanPlusPlus
from adamerge.rules.regmean import regression_mean
from adamerge.statistics import collect


class Stack(nn.Module):
    """A scale that lies in no block, then two blocks of a layer and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        x = x * self.scale
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def states():
    torch.manual_seed(0)
    return [{n: torch.randn(v.shape, dtype=torch.float64) for n, v in Stack().state_dict().items()} for _ in range(3)]


@pytest.fixture
def data():
    torch.manual_seed(1)
    x = {task: torch.randn(20, 3, dtype=torch.float64) for task in ("a", "b")}
    return {task: lambda x=x[task]: x.split(8) for task in x}


def test_block_by_block_by_hand(states, data):
    base, *experts = states
    vectors = TaskVectors.from_state_dicts(base, dict(zip("ab", experts, strict=True)))
    statistics = collect_through(Stack().double(), vectors, data, RegMeanPlusPlus(rho=0.8))
    merged = merge(vectors, [RegMeanPlusPlus(statistics, rho=0.8)])
    scale = (experts[0]["scale"] + experts[1]["scale"]) / 2
    x = {task: torch.cat(data[task]()) * scale for task in "ab"}
    for i in range(2):
        weight, bias = f"blocks.{i}.0.weight", f"blocks.{i}.0.bias"
        deltas = torch.stack([expert[weight] - base[weight] for expert in experts])
        expected = base[weight] + regression_mean(deltas, [x[t].T @ x[t] / 20 for t in "ab"], 0.8, 1e-6)
        assert_close(merged[weight], expected)
        offset = (experts[0][bias] + experts[1][bias]) / 2
        x = {task: (x[task] @ expected.T + offset).relu() for task in "ab"}


def test_it_is_another_merge_than_that_of_the_experts_inputs(states, data):
    base, *experts = states
    vectors = TaskVectors.from_state_dicts(base, dict(zip("ab", experts, strict=True)))
    through = collect_through(Stack().double(), vectors, data)
    own = collect(Stack().double(), dict(zip("ab", experts, strict=True)), data)
    one, other = merge(vectors, [RegMeanPlusPlus(through)]), merge(vectors, [RegMean(own)])
    assert not torch.allclose(one["blocks.1.0.weight"], other["blocks.1.0.weight"], rtol=1e-3)
    with pytest.raises(InputError, match="RegMeanPlusPlus needs the merged_gram of 'a'"):
        merge(vectors, [RegMeanPlusPlus(own)])


def test_identical_experts_are_found_again(states, data):
    vectors = TaskVectors.from_state_dicts(states[0], dict.fromkeys("ab", states[1]))
    merged = merge(vectors, [RegMeanPlusPlus(collect_through(Stack().double(), vectors, data))])
    for name, value in states[1].items():
        assert_close(merged[name], value)


def test_every_expert_needs_data(states, data):
    vectors = TaskVectors.from_state_dicts(states[0], dict(zip("ab", states[1:], strict=True)))
    with pytest.raises(InputError, match="no data for expert 'b'"):
        collect_through(Stack().double(), vectors, {"a": data["a"]})
