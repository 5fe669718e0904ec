"""Model Stock: cosines pair by pair, and clear of the pole."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError
from adamerge.rules import ModelStock
from adamerge.rules.stock import model_stock


def by_hand(deltas: list[list[float]]) -> list[float]:
    cosines = []
    for a, b in itertools.combinations(deltas, 2):
        norms = math.hypot(*a) * math.hypot(*b)
        cosines.append(sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0)
    cosine = min(max(sum(cosines) / len(cosines), 0.0), 1.0)
    t = len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine)
    return [t * sum(column) / len(deltas) for column in zip(*deltas, strict=True)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_mean_cosine_decides(count):
    deltas = torch.randn(count, 2, 6, dtype=torch.float64) + 1
    expected = torch.tensor(by_hand(deltas.flatten(1).tolist()), dtype=torch.float64).view(2, 6)
    assert_close(model_stock(deltas), expected, rtol=1e-12, atol=1e-14)
    for i, row in enumerate(model_stock(deltas, per="row")):
        assert_close(row.tolist(), by_hand(deltas[:, i].tolist()), rtol=1e-12, atol=1e-14)


def test_two_experts_at_sixty_degrees():
    deltas = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    assert_close(model_stock(deltas), 2 / 3 * deltas.mean(0))  # c = 1/2, t = 1 / 1.5


def test_a_vector_is_one_row_and_a_filter_another():
    deltas = torch.randn(3, 4, 2, 2, dtype=torch.float64) + 1
    assert torch.equal(model_stock(deltas, "row"), model_stock(deltas.flatten(2), "row").view(4, 2, 2))
    assert torch.equal(model_stock(deltas[:, 0, 0], "row"), model_stock(deltas[:, 0, 0]))


@pytest.mark.parametrize("spread", [-0.13, -0.14, -0.15])
def test_near_the_pole_the_base_remains(spread):
    """Eight vectors whose cosines are all the same, on both sides of -1/7."""
    gram = torch.full((8, 8), max(spread, -1 / 7), dtype=torch.float64).fill_diagonal_(1.0)
    values, directions = torch.linalg.eigh(gram)
    deltas = directions * values.clamp(min=0).sqrt()
    assert not model_stock(deltas).any()


def test_a_zero_delta_counts_as_orthogonal():
    a, b = [3.0, 4.0], [4.0, 3.0]
    assert_close(model_stock(torch.tensor([a, b, [0.0, 0.0]])).tolist(), by_hand([a, b, [0.0, 0.0]]), rtol=1e-6, atol=0)
    assert not model_stock(torch.zeros(2, 3, 4), "row").any()


def test_another_grain_is_refused():
    with pytest.raises(InputError, match="expected per to be 'tensor' or 'row' in ModelStock, got 'column'"):
        ModelStock("column")
