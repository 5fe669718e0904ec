"""Superposed directions: each expert's own response is kept, wherever directions do not coincide."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import TaskVectors, merge
from adamerge.rules import Stf


def merged(deltas: torch.Tensor) -> torch.Tensor:
    experts = {f"t{k}": {"w": delta} for k, delta in enumerate(deltas)}
    return merge(TaskVectors.from_state_dicts({"w": torch.zeros_like(deltas[0])}, experts), [Stf()])["w"]


@pytest.mark.parametrize("shape", [(3, 12, 20), (4, 20, 12)])
def test_every_expert_finds_its_own_singular_values(shape):
    deltas = torch.randn(shape, dtype=torch.float64)
    found, rank = merged(deltas), 12 // shape[0]
    for delta in deltas:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        for i in range(rank):
            assert_close(u[:, i] @ found @ v[i], s[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize("count", [2, 4, 9])
def test_experts_that_coincide_give_their_leading_directions(count):
    delta = torch.randn(8, 8, dtype=torch.float64)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    rank = max(1, 8 // count)
    expected = (u * s)[:, :rank] @ v[:rank]
    assert_close(merged(delta.expand(count, 8, 8)), expected, rtol=0, atol=1e-12)
    assert_close(merged(torch.stack([delta, -delta])), torch.zeros(8, 8).double(), rtol=0, atol=1e-12)
