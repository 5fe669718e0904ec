"""Select, calculate, erase, by hand."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Sce
from adamerge.rules.sce import select


def sce(rows: list[list[float]], keep: float) -> list[float]:
    values = torch.tensor(rows, dtype=torch.float64)
    base = {"w": torch.zeros_like(values[0])}
    tv = TaskVectors.from_state_dicts(base, {str(k): {"w": row} for k, row in enumerate(values)})
    return merge(tv, rules=[Sce(keep)])["w"].tolist()


def test_selection_counts_what_varies():
    deltas = torch.tensor([[1.0, 5.0, 3.0, 2.0, 0.0], [1.0, 1.0, 2.0, -2.0, 0.0]])
    # Variances 0, 4, 1/4, 4, 0: two thirds of three are two, a tenth is one, and equal ones go together.
    assert select(deltas, 2 / 3).tolist() == [[0, 5, 0, 2, 0], [0, 1, 0, -2, 0]]
    assert torch.equal(select(deltas, 0.1), select(deltas, 2 / 3))
    assert torch.equal(select(deltas, 1.0), deltas)


def test_the_vote_is_weighed_by_how_far_an_expert_moved():
    # Energies 25, 5 and 4 in thirds; the signs of the sums are +, −, +, and the last entry is the third expert's alone.
    merged = sce([[4.0, -3.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]], keep=1.0)
    assert_close(merged, [(25 * 4 + 5 * 1) / 30, -3.0, 2.0])


def test_a_tie_of_signs_goes_up():
    assert sce([[1.0], [-1.0]], keep=1.0) == [1.0]


def test_what_is_not_selected_weighs_nothing():
    # Only the second entry is selected: energies 1/2 and 2, not 10001 / 2 and 10004 / 2.
    assert_close(sce([[100.0, 1.0], [100.0, 2.0]], keep=0.5), [0.0, (1 * 1 + 4 * 2) / 5])


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 7, 11])
def test_experts_that_agree_lose_nothing(experts):
    row = torch.randn(50, dtype=torch.float64).tolist()
    assert_close(sce([row] * experts, keep=0.1), row, rtol=1e-14, atol=0)


@pytest.mark.parametrize("keep", [0.0, 1.1])
def test_a_share_is_wanted(keep):
    with pytest.raises(InputError, match=f"expected 0 < keep <= 1 in Sce, got {keep}"):
        Sce(keep)
