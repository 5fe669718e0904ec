"""Merges with one singular value: flat spectra over the directions that there are."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import TaskVectors, merge
from adamerge.rules import IsoC


def merged(deltas: torch.Tensor, base: torch.Tensor | None = None) -> torch.Tensor:
    base = torch.zeros_like(deltas[0]) if base is None else base
    experts = {f"t{k}": {"w": base + delta} for k, delta in enumerate(deltas)}
    return merge(TaskVectors.from_state_dicts({"w": base}, experts), [IsoC()])["w"] - base


@pytest.mark.parametrize("shape", [(3, 12, 20), (3, 20, 12), (4, 9, 9)])
def test_the_spectrum_of_the_sum_is_flat(shape):
    deltas = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    found = merged(deltas)
    assert_close(found, s.mean() * u @ v, rtol=0, atol=1e-11)
    assert_close(torch.linalg.svdvals(found), s.mean().expand(len(s)), rtol=0, atol=1e-12)


def test_rounding_is_not_blown_up():
    """Two experts of rank 2 in float32: their sum has 4 directions, and 36 that are rounding."""
    base = torch.randn(40, 40)
    deltas = torch.stack([torch.randn(40, 2) @ torch.randn(2, 40) for _ in range(2)]) / 1000
    spectrum = torch.linalg.svdvals(deltas.double().sum(0))
    found = torch.linalg.svdvals(merged(deltas, base).double())
    assert_close(found[:4], spectrum[:4].mean().expand(4), rtol=1e-3, atol=0)
    assert found[4:].max() < 1e-4 * found[0]


def test_a_sum_that_cancels_stays_zero():
    base, delta = torch.randn(9, 9), torch.randn(9, 9)
    assert merged(torch.stack([delta, -delta]), base).abs().max() < 1e-5


def test_one_expert_of_rank_one_is_that_expert():
    delta = torch.outer(torch.randn(6), torch.randn(4).double())
    assert_close(merged(delta.unsqueeze(0)), delta, rtol=0, atol=1e-14)
