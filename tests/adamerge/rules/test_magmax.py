"""The largest entry, and which one where several are."""

import torch

from adamerge import TaskVectors, merge
from adamerge.rules import Dare, MagMax, Trim
from adamerge.rules.magmax import larger


def test_the_largest_magnitude_is_taken_with_its_sign():
    base = {"w": torch.tensor([10.0, 10.0, 10.0])}
    experts = {"a": {"w": torch.tensor([13.0, 9.0, 10.0])}, "b": {"w": torch.tensor([12.0, 6.0, 10.5])}}
    merged = merge(TaskVectors.from_state_dicts(base, experts), rules=[MagMax()], scale=0.5)
    assert merged["w"].tolist() == [11.5, 8, 10.25]


def test_the_later_of_equals_is_taken():
    base = {"w": torch.zeros(2)}
    experts = {"a": {"w": torch.tensor([2.0, -1.0])}, "b": {"w": torch.tensor([-2.0, 1.0])}}
    tv = TaskVectors.from_state_dicts(base, experts)
    assert merge(tv, rules=[MagMax()])["w"].tolist() == [-2, 1]


def test_experts_may_come_one_by_one(base, experts):
    tv = TaskVectors.from_state_dicts(base, experts)
    merged = merge(tv, rules=[MagMax()])
    for name, deltas in tv.deltas.items():
        so_far = deltas[0]
        for delta in deltas[1:]:
            so_far = larger(so_far, delta)
        assert torch.equal(merged[name], base[name] + so_far)


def test_transforms_may_come_first(base, experts):
    tv = TaskVectors.from_state_dicts(base, experts)
    for step in (Trim(0.2), Dare(0.5)):
        merged, after = merge(tv, rules=[step, MagMax()]), step(tv)
        for name, deltas in after.deltas.items():
            largest = deltas.abs().max(0).values
            assert torch.equal((merged[name] - base[name]).abs(), largest)
