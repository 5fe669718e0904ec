"""RegMean is least squares."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.observing import Observation
from adamerge.rules import Fisher, Mean, RegMean
from adamerge.rules.regmean import regression_mean
from adamerge.statistics import Statistics, collect

TASKS = ("a", "b", "c")


def layer(seed: int, columns: int = 3, rows: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "weight": torch.randn(rows, columns, dtype=torch.float64),
        "bias": torch.randn(rows, dtype=torch.float64),
    }


@pytest.fixture
def experts():
    return {task: layer(seed) for seed, task in enumerate(TASKS, 1)}


@pytest.fixture
def inputs():
    torch.manual_seed(9)
    return {
        task: torch.randn(7, 3, dtype=torch.float64) * scale for task, scale in zip(TASKS, (1, 2, 0.5), strict=True)
    }


def measured(inputs, experts) -> Statistics:
    return collect(nn.Linear(3, 2).double(), experts, {task: lambda x=x: x.split(4) for task, x in inputs.items()})


def test_one_layer_is_the_least_squares_fit_to_what_the_experts_answer(inputs, experts):
    vectors = TaskVectors.from_state_dicts(layer(0), experts)
    merged = merge(vectors, [RegMean(measured(inputs, experts), rho=1.0, ridge=1e-13)])
    x = torch.cat([inputs[task] for task in TASKS])
    answers = torch.cat([inputs[task] @ experts[task]["weight"].T for task in TASKS])
    assert_close(merged["weight"], torch.linalg.lstsq(x, answers).solution.T)
    assert_close(merged["bias"], sum(expert["bias"] for expert in experts.values()) / 3)


def test_without_correlations_every_column_is_a_weighted_mean(inputs, experts):
    merged = merge(TaskVectors.from_state_dicts(layer(0), experts), [RegMean(measured(inputs, experts), rho=0.0)])
    for row in range(2):
        for column in range(3):
            shares = [float(inputs[task][:, column].square().mean()) for task in TASKS]
            values = [float(experts[task]["weight"][row, column]) for task in TASKS]
            mean = sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares)
            assert float(merged["weight"][row, column]) == pytest.approx(mean, rel=1e-5)


def test_rho_shrinks_what_lies_off_the_diagonal():
    """Σₖ τₖ Ĝₖ = X Σₖ Ĝₖ, entry by entry."""
    torch.manual_seed(0)
    deltas = torch.randn(2, 3, 4, dtype=torch.float64)
    grams = [(x.T @ x) for x in torch.randn(2, 6, 4, dtype=torch.float64)]
    merged = regression_mean(deltas, grams, 0.7, 1e-14)
    shrunk = [
        torch.tensor([[float(g[i, j]) * (1 if i == j else 0.7) for j in range(4)] for i in range(4)]) for g in grams
    ]
    left = sum(delta @ gram.double() for delta, gram in zip(deltas, shrunk, strict=True))
    assert_close(merged @ sum(gram.double() for gram in shrunk), left, rtol=1e-6, atol=1e-6)


def test_inputs_that_never_come_leave_the_mean(experts, inputs):
    for x in inputs.values():
        x[:, 1] = 0
    merged = merge(TaskVectors.from_state_dicts(layer(0), experts), [RegMean(measured(inputs, experts))])
    assert_close(merged["weight"][:, 1], sum(expert["weight"][:, 1] for expert in experts.values()) / 3)


def test_transposed_weights(experts, inputs):
    usual = merge(TaskVectors.from_state_dicts(layer(0), experts), [RegMean(measured(inputs, experts))])
    statistics = Statistics(
        {
            t: Observation(o.tensors, transposed=frozenset(["weight"]))
            for t, o in measured(inputs, experts).observations.items()
        }
    )
    turned = [{**state, "weight": state["weight"].T} for state in (layer(0), *experts.values())]
    merged = merge(
        TaskVectors.from_state_dicts(turned[0], dict(zip(TASKS, turned[1:], strict=True))), [RegMean(statistics)]
    )
    assert_close(merged["weight"], usual["weight"].T)


def test_a_folder_gives_what_memory_gives(tmp_path, experts, inputs):
    statistics = measured(inputs, experts)
    statistics.save(tmp_path / "grams")
    vectors = TaskVectors.from_state_dicts(layer(0), experts)
    assert torch.equal(
        merge(vectors, [RegMean(tmp_path / "grams")])["weight"], merge(vectors, [RegMean(statistics)])["weight"]
    )


def test_what_is_missing_is_said_before_work_starts(tmp_path, experts, inputs):
    vectors, statistics = TaskVectors.from_state_dicts(layer(0), experts), measured(inputs, experts)
    with pytest.raises(InputError, match="holds no statistics"):
        merge(vectors, [RegMean(tmp_path)])
    fewer = Statistics({task: statistics.observations[task] for task in ("a", "b")})
    with pytest.raises(InputError, match="RegMean has no statistics of 'c', only of a, b"):
        merge(vectors, [RegMean(fewer)])
    other = Statistics({task: Observation({"fisher/weight": torch.ones(2, 3)}) for task in TASKS})
    with pytest.raises(InputError, match="RegMean needs the gram of 'a'"):
        merge(vectors, [RegMean(other)])
    odd = Statistics({task: Observation({"gram/weight": torch.eye(4)}) for task in TASKS})
    with pytest.raises(InputError, match=r"weight: the gram of 'a' has shape \[4, 4\], expected \[3, 3\]"):
        merge(vectors, [RegMean(odd)])
    with pytest.raises(InputError, match="0 <= rho <= 1"):
        RegMean(statistics, rho=1.5)


def test_a_singular_sum_of_grams_is_named():
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(InputError, match="head: the sum of its Grams is singular"):
        regression_mean(torch.ones(1, 2, 2), [gram], 1.0, 1e-6, name="head")


def test_relative_errors_let_no_expert_outvote_the_others():
    """Two experts on the same inputs, one of which moved ten times as far: c = 1 : 1/100."""
    deltas = torch.tensor([[[1.0, 2.0]], [[-20.0, 10.0]]], dtype=torch.float64)
    merged = regression_mean(deltas, [torch.eye(2)] * 2, 1.0, 1e-12, relative=True)
    assert_close(merged, torch.tensor([[(1 - 0.2) / 1.01, (2 + 0.1) / 1.01]], dtype=torch.float64))


@pytest.mark.parametrize("turned", [False, True])
def test_fused_queries_keys_and_values_may_be_split(inputs, turned):
    """Every row of a layer is a regression of its own."""
    name = "h.0.attn.c_attn.weight" if turned else "h.0.attn.qkv.weight"
    torch.manual_seed(0)
    states = [{name: torch.randn((3, 9) if turned else (9, 3), dtype=torch.float64)} for _ in range(4)]
    vectors = TaskVectors.from_state_dicts(states[0], dict(zip(TASKS, states[1:], strict=True)))
    flipped = frozenset([name] if turned else [])
    tensors = {t: {f"gram/{name}": x.T @ x, f"fisher/{name}": states[0][name].square()} for t, x in inputs.items()}
    statistics = Statistics({t: Observation(each, transposed=flipped) for t, each in tensors.items()})
    whole, parts = (merge(vectors, [RegMean(statistics)], split_fused_qkv=split) for split in (False, True))
    assert_close(parts[name], whole[name])
    assert not torch.allclose(parts[name], merge(vectors, [Mean()])[name])
    with pytest.raises(InputError, match="merge without split_fused_qkv"):
        merge(vectors, [Fisher(statistics)], split_fused_qkv=True)
