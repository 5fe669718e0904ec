"""Competition, against sorted lists of numbers."""

import math

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Pcb


def merged(rows: list[list[float]], split: int, **arguments: float) -> list[float]:
    """Merge task vectors over two tensors, beside one that nobody changed."""
    values = torch.tensor(rows, dtype=torch.float64)
    states = [{"u": row[:split], "v": row[split:], "frozen": torch.ones(50)} for row in values]
    base = {"u": torch.zeros(split), "v": torch.zeros(len(rows[0]) - split), "frozen": torch.ones(50)}
    base = {name: value.to(states[0][name].dtype) for name, value in base.items()}
    tv = TaskVectors.from_state_dicts(base, {str(k): state for k, state in enumerate(states)})
    result = merge(tv, rules=[Pcb(**arguments)])
    return result["u"].tolist() + result["v"].tolist()


def expected(rows: list[list[float]], keep: float, clip: float) -> list[float]:
    """The equations, number by number."""
    experts, size = len(rows), len(rows[0])
    sums = [sum(row[i] for row in rows) for i in range(size)]
    weights = []
    for row in rows:
        ordered = sorted(abs(x) for x in row)
        low, high = ordered[int(clip * size)], ordered[size - int(clip * size) - 1]
        sizes = [(min(max(abs(x), low), high) - low) / (high - low) for x in row]
        balance = [math.exp(experts * a * a) * math.tanh(x * s) for a, x, s in zip(sizes, row, sums, strict=True)]
        ordered = sorted(balance)
        least = max(ordered[size - int(keep * size)], 0.0)
        weights.append([max(b - least, 0.0) / (ordered[-1] - least) for b in balance])
    return [
        sum(w[i] * row[i] for w, row in zip(weights, rows, strict=True)) / max(sum(w[i] for w in weights), 1e-12)
        for i in range(size)
    ]


@pytest.mark.parametrize("experts", [1, 2, 5])
@pytest.mark.parametrize(("keep", "clip"), [(0.1, 0.0), (0.2, 0.01), (0.5, 0.1)])
def test_the_equations(experts, keep, clip):
    rows = torch.randn(experts, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(experts)).tolist()
    assert_close(merged(rows, 150, keep=keep, clip=clip), expected(rows, keep, clip), rtol=1e-10, atol=1e-12)


def test_entries_against_all_others_have_no_weight():
    rows = [[-1.0, 2.0, 3.0, 1.0], [3.0, 2.0, 1.0, 1.0], [3.0, 2.0, 2.0, 1.0]]
    assert merged(rows, 2, keep=1.0, clip=0.0)[0] == 3.0


def test_many_experts_overflow_nothing():
    rows = torch.randn(100, 30, generator=torch.Generator().manual_seed(0))
    tv = TaskVectors.from_state_dicts({"w": torch.zeros(30)}, {str(k): {"w": row} for k, row in enumerate(rows)})
    merged = merge(tv, rules=[Pcb()])["w"]
    assert merged.isfinite().all()
    assert merged.any()


def test_equal_entries_all_stay():
    assert merged([[2.0] * 5, [4.0] * 5], 2) == [3.0] * 5


@pytest.mark.parametrize(("keep", "clip"), [(0.0, 0.1), (1.1, 0.1), (0.1, 0.5), (0.1, -0.1)])
def test_shares_are_wanted(keep, clip):
    with pytest.raises(InputError, match=f"in Pcb, got {keep} and {clip}"):
        Pcb(keep, clip)
