"""Statistics are those of the experts at hand, or are refused."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from adamerge import InputError, TaskVectors, merge
from adamerge.observing import Observation
from adamerge.provenance import signature
from adamerge.relay import collect_through
from adamerge.rules import Aim, RegMean, RegMeanPlusPlus, TaskArithmetic, Trim
from adamerge.statistics import Statistics, collect

TASKS = ("plain", "odd")


def network(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def pool():
    """A base and experts a twentieth of its norm away from it."""
    base = network().state_dict()
    return base, {task: {name: near(value) for name, value in base.items()} for task in TASKS}


def near(value):
    return value + 0.05 * value.norm() * torch.randn_like(value) / value.numel() ** 0.5


@pytest.fixture
def batches():
    return {task: lambda seed=seed: [torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))]
            for seed, task in enumerate(TASKS)}  # fmt: skip


def test_another_expert_is_refused_by_name(tmp_path, pool, batches):
    base, experts = pool
    collect(network(), experts, batches).save(tmp_path)
    vectors = TaskVectors.from_state_dicts(base, experts)
    assert merge(vectors, [RegMean(tmp_path)])
    assert merge(vectors, [Trim(0.5), RegMean(tmp_path)])  # transforms come after the comparison
    other = {**experts, "odd": {**experts["odd"], "2.weight": near(base["2.weight"])}}
    swapped = dict(zip(TASKS, reversed(experts.values()), strict=True))
    for states, task, name in ((other, "odd", "2"), (swapped, "plain", "[02]")):
        message = rf"RegMean: the statistics of '{task}' were measured on other weights .* in {name}\.weight: collect"
        with pytest.raises(InputError, match=message):
            merge(TaskVectors.from_state_dicts(base, states), [RegMean(tmp_path)])


def test_weights_that_were_rounded_are_the_same(tmp_path, pool, batches):
    base, experts = pool
    collect(network(), experts, batches).save(tmp_path)
    rounded = [{n: v.bfloat16() for n, v in state.items()} for state in (base, *experts.values())]
    assert merge(
        TaskVectors.from_state_dicts(rounded[0], dict(zip(TASKS, rounded[1:], strict=True))), [RegMean(tmp_path)]
    )


def test_another_base_is_refused(pool, batches):
    base, experts = pool
    magnitude = collect(network(), {"base": base}, {"base": batches["odd"]}, ("magnitude",))
    rules = [TaskArithmetic(), Aim(magnitude)]
    assert merge(TaskVectors.from_state_dicts(base, experts), rules)
    moved = {n: v + 0.05 * torch.randn_like(v) for n, v in base.items()}
    with pytest.raises(InputError, match="Aim: the statistics of 'base' were measured on other weights"):
        merge(TaskVectors.from_state_dicts(moved, experts), rules)


def test_statistics_through_the_merge_know_their_experts(pool, batches):
    base, experts = pool
    vectors = TaskVectors.from_state_dicts(base, experts)
    statistics = collect_through(network(), vectors, batches)
    assert merge(vectors, [RegMeanPlusPlus(statistics)])
    swapped = TaskVectors.from_state_dicts(base, dict(zip(TASKS, reversed(experts.values()), strict=True)))
    with pytest.raises(InputError, match="RegMeanPlusPlus: the statistics of 'plain' were measured on other weights"):
        merge(swapped, [RegMeanPlusPlus(statistics)])


def test_another_model_is_refused_before_work_starts(pool, batches):
    base, experts = pool
    statistics = collect(network(), experts, batches)
    vectors = TaskVectors.from_state_dicts(base, experts)
    renamed = {
        t: replace(o, tensors={k.replace("/", "/body."): v for k, v in o.tensors.items()})
        for t, o in statistics.observations.items()
    }
    message = "RegMean has the gram of other tensors than these experts have: of 'plain', for example, body.0.weight"
    with pytest.raises(InputError, match=re.escape(message)):
        merge(vectors, [RegMean(Statistics(renamed))])
    wider = {task: network(7).state_dict() for task in TASKS}
    with pytest.raises(InputError, match=r"2\.weight: the gram of 'plain' has shape \[7, 7\], expected \[5, 5\]"):
        merge(vectors, [RegMean(collect(network(7), wider, batches))])


@pytest.mark.parametrize(
    ("measure", "shape", "flipped", "wanted"),
    [
        ("gram", (4, 5), False, [5, 5]), ("gram", (4, 5), True, [4, 4]), ("output_gram", (4, 5), False, [4, 4]),
        ("output_gram", (4, 5), True, [5, 5]), ("magnitude", (5,), False, [5]), ("magnitude", (4, 5), True, [4]),
        ("fisher", (4, 5), False, [4, 5]), ("sensitivity", (4, 5), False, []), ("share", (4,), False, []),
    ],
)  # fmt: skip
def test_shapes(measure, shape, flipped, wanted):
    from adamerge.provenance import examine

    vectors = TaskVectors.from_state_dicts({"w": torch.zeros(shape)}, {"x": {"w": torch.ones(shape)}})
    transposed = frozenset("w" if flipped else "")
    for found in (wanted, [2, 2, 2]):
        statistics = Statistics({"x": Observation({f"{measure}/w": torch.zeros(found)}, transposed=transposed)})
        if found == wanted:
            examine(statistics, (measure,), vectors, False, "Rule")
        else:
            with pytest.raises(InputError, match=re.escape(f"has shape [2, 2, 2], expected {wanted}")):
                examine(statistics, (measure,), vectors, False, "Rule")


def test_signatures_are_kept_in_files_and_differ_by_as_much_as_weights(tmp_path, pool, batches):
    _, experts = pool
    statistics = collect(network(), experts, batches)
    statistics.save(tmp_path)
    for task in TASKS:
        kept = Statistics.open(tmp_path).observations[task].signatures
        assert (
            kept
            == statistics.observations[task].signatures
            == {n: signature(experts[task][n]) for n in ("0.weight", "2.weight")}
        )
    gaps = [(signature(w) - signature(w + d)) ** 2 / float(d.square().sum())
            for w, d in torch.randn(400, 2, 6, 7, dtype=torch.float64)]  # fmt: skip
    assert sum(gaps) / 400 == pytest.approx(1, abs=0.35)
