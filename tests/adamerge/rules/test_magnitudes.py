"""The k-th magnitude: what a sort finds, whatever a sample suggests and in however many pieces the values come."""

import math

import pytest
import torch

from adamerge import TaskVectors, differences
from adamerge.rules import Trim, magnitudes
from adamerge.rules.magnitudes import Sample, kth, kth_magnitudes, survey

RANKS = (1, 2, 500, 799, 999, 1000)


@pytest.fixture(params=[torch.float32, torch.float64])
def values(request) -> torch.Tensor:
    values = torch.randn(3, 1000, dtype=request.param) * torch.logspace(-3, 3, 1000, dtype=request.param)
    values[1, :400] = 0
    values[2, 100:700] = -1.5
    return values


def sort(values: torch.Tensor, rank: int) -> torch.Tensor:
    return values.abs().sort(1).values[:, rank - 1]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("like", ["itself", "far too small", "far too large", "one value"])
def test_any_sample_leads_to_the_value_that_a_sort_finds(values, rank, like):
    factor = {"itself": 1.0, "far too small": 1e-6, "far too large": 1e6, "one value": 0.0}[like]
    sample = Sample(values.abs() * factor + (factor == 0), torch.ones(1000, dtype=torch.float64))
    found = kth_magnitudes(lambda work: map(work, values.split(300, dim=1)), rank, values.dtype, 3, sample)
    assert found.dtype == values.dtype
    assert torch.equal(found, sort(values, rank))


def passes(values: torch.Tensor, rank: int, sample: Sample | None) -> int:
    count = 0

    def each(work):
        nonlocal count
        count += 1
        return map(work, values.split(30_000, dim=1))

    assert torch.equal(kth_magnitudes(each, rank, values.dtype, len(values), sample), sort(values, rank))
    return count


def test_a_sample_saves_a_pass():
    values = torch.randn(2, 200_000)
    sample = Sample(values[:, ::4].abs(), torch.full((50_000,), 4.0, dtype=torch.float64))
    assert passes(values, 160_000, None) == 2
    assert passes(values, 160_000, sample) == 1
    missed = Sample(sample.magnitudes / 2, sample.weights)
    assert passes(values, 160_000, missed) == 3
    assert passes(values.double(), 160_000, None) == 4


def test_bounds_count_what_a_value_stands_for():
    magnitudes = torch.arange(40_000.0).flip(0)[None]
    weights = torch.ones(40_000, dtype=torch.float64).index_fill_(0, torch.arange(10_000), 7.0)
    sample = Sample(magnitudes, weights)  # 30 000 small values, and 10 000 large ones that stand for 7 each
    low, high = sample.bounds(0, 65_000)
    room = (0.005 + 2 / 200) * 100_000
    assert low == pytest.approx(30_000 + (35_000 - room) / 7, abs=2)
    assert high == pytest.approx(30_000 + (35_000 + room) / 7, abs=2)
    assert sample.bounds(0, 1)[0] == 0.0
    assert sample.bounds(0, 100_000)[1] == math.inf


def test_a_survey_finds_what_moved_and_where_it_did_not_look_first():
    base = {"moved": torch.zeros(600, 512), "frozen": torch.zeros(600, 512), "hidden": torch.zeros(600, 512)}
    expert = {name: value.clone() for name, value in base.items()} | {"moved": torch.randn(600, 512)}
    expert["hidden"][123, 45] = 1.0
    tv = TaskVectors.from_state_dicts({**base, "steps": torch.tensor(1)}, {"a": {**expert, "steps": torch.tensor(2)}})
    sizes, sample = survey(tv)
    assert sizes == {"moved": 600 * 512, "hidden": 600 * 512}
    assert sample.weights.sum() == 2 * 600 * 512
    assert sample.magnitudes.shape[1] < 600 * 512 / 32


@pytest.mark.parametrize("piece", [7, 64, 2**18])
def test_thresholds_do_not_depend_on_pieces(monkeypatch, piece):
    state = {"w": torch.randn(70, 30), "v": torch.randn(900), "s": torch.randn(()), "none": torch.zeros(0, 3)}
    tv = TaskVectors.from_state_dicts({name: torch.zeros_like(value) for name, value in state.items()}, {"a": state})
    monkeypatch.setattr(differences, "PIECE", piece)
    every = torch.cat([value.flatten() for value in state.values()])
    assert Trim(0.3).fit(tv).tolist() == sort(every[None], 3001 - int(0.3 * 3001)).tolist()
    kept = Trim(0.3)(tv).deltas
    assert sum(int(deltas.count_nonzero()) for deltas in kept.values()) == int(0.3 * 3001) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["continuous", "in half precision", "mostly zeros", "small ones where a sample looks"])
def test_the_kth_of_many_is_that_of_a_sort(monkeypatch, dtype, kind):
    monkeypatch.setattr(magnitudes, "_COUNTED", 2**12)
    monkeypatch.setattr(magnitudes, "_SAMPLED", 2**9)
    values = torch.randn(2, 20_000, dtype=dtype).abs()
    if kind == "in half precision":
        values = values.bfloat16().to(dtype)
    elif kind == "mostly zeros":
        values = values * (values > 2)
    elif kind.startswith("small"):
        values[:, :: 20_000 // 2**9 | 1] *= 1e-3
    order = values.sort(1).values
    for rank in (1, 2, 9_999, 16_000, 19_999, 20_000):
        assert torch.equal(kth(values, rank), order[:, rank - 1])
        assert torch.equal(kth(values[1], rank), order[1, rank - 1])
