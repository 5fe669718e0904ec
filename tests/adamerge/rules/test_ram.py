"""Shared entries averaged, unique ones enlarged: counted by hand."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Ram

# Expert a shares two entries and has four of its own; b shares three and has one; c shares one and has none.
DELTAS = {
    "u": [[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 5.0, 7.0], [0.0, 0.0, 0.0, 0.0]],
    "v": [[5.0, 1.0, 0.0, 0.0], [0.0, 0.0, 6.0, 2.0], [0.0, 0.0, 0.0, 4.0]],
}


@pytest.fixture
def tv() -> TaskVectors:
    values = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in DELTAS.items()}
    experts = {task: {name: rows[k] for name, rows in values.items()} for k, task in enumerate("abc")}
    return TaskVectors.from_state_dicts({name: torch.zeros_like(rows[0]) for name, rows in values.items()}, experts)


def test_what_is_unique_is_kept_and_what_is_shared_is_averaged(tv):
    merged = merge(tv, rules=[Ram()])
    assert merged["u"].tolist() == [1, 2, 4, 5.5]
    assert merged["v"].tolist() == [5, 1, 6, 3]


def test_what_is_unique_is_enlarged_by_what_is_shared_in_the_whole_model(tv):
    assert_close(Ram(0.1, cap=9.0).fit(tv), 1 + 0.1 * torch.tensor([2 / 4, 3 / 1, 1.0], dtype=torch.float64))
    merged = merge(tv, rules=[Ram(0.1, cap=9.0)])
    assert_close(merged["u"].tolist(), [1.05, 2.1, 4.0, 5.5])
    assert_close(merged["v"].tolist(), [5.25, 1.05, 6 * 1.3, 3.0])


def test_there_is_a_cap(tv):
    assert_close(Ram(0.1, cap=0.6).fit(tv), torch.tensor([1.05, 1.06, 1.06], dtype=torch.float64))


def test_below_the_threshold_nothing_has_moved(tv):
    merged = merge(tv, rules=[Ram(threshold=4.0)])
    assert merged["u"].tolist() == [0, 0, 5, 7]
    assert merged["v"].tolist() == [5, 0, 6, 0]


@pytest.mark.parametrize("arguments", [{"rescale": -0.1}, {"cap": -1.0}, {"threshold": -1e-5}])
def test_no_argument_is_negative(arguments):
    with pytest.raises(InputError, match="expected no negative argument in Ram, got"):
        Ram(**arguments)
