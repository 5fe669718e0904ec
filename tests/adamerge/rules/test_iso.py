"""Merges with one singular value: flat spectra over the directions that there are."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import IsoC, IsoCts, Rule


def merged(deltas: torch.Tensor, base: torch.Tensor | None = None, rule: Rule | None = None) -> torch.Tensor:
    base = torch.zeros_like(deltas[0]) if base is None else base
    experts = {f"t{k}": {"w": base + delta} for k, delta in enumerate(deltas)}
    return merge(TaskVectors.from_state_dicts({"w": base}, experts), [rule or IsoC()])["w"] - base


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


def by_svd(deltas: torch.Tensor, common: float) -> torch.Tensor:
    """Iso-CTS with singular value decompositions throughout."""
    rank = min(deltas.shape[1:])
    own = round((rank - int(common * rank)) / len(deltas))
    u, s, v = (part[..., : rank - own * len(deltas)] for part in svd(deltas.sum(0)))
    lefts, values, rights = [u], [s], [v]
    for delta in deltas:
        parts = (part[..., :own] for part in svd(delta - u @ u.T @ delta))
        for found, part in zip((lefts, values, rights), parts, strict=True):
            found.append(part)
    a, _, b = svd(torch.cat(lefts, 1))
    c, _, d = svd(torch.cat(rights, 1))
    return torch.cat(values).mean() * (a @ b.T) @ (c @ d.T).T


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, v.T


@pytest.mark.parametrize("shape", [(3, 12, 20), (2, 20, 12), (4, 10, 10)])
@pytest.mark.parametrize("common", [0.8, 0.35])
def test_common_and_own_directions(shape, common):
    deltas = torch.randn(shape, dtype=torch.float64)
    found = merged(deltas, rule=IsoCts(common))
    assert_close(found, by_svd(deltas, common), rtol=0, atol=1e-11)
    spectrum = torch.linalg.svdvals(found)
    assert_close(spectrum, spectrum.mean().expand(len(spectrum)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 12, 20), (4, 9, 9), (13, 4, 6)])
def test_common_directions_alone_are_those_of_the_sum(shape):
    deltas = torch.randn(shape, dtype=torch.float64)
    assert_close(merged(deltas, rule=IsoCts(1.0)), merged(deltas), rtol=0, atol=1e-12)


def test_experts_without_directions_of_their_own_get_none():
    """Rank 2 each, in float32: the sum's 4 directions leave nothing but rounding to either."""
    base = torch.randn(40, 40)
    deltas = torch.stack([torch.randn(40, 2) @ torch.randn(2, 40) for _ in range(2)]) / 1000
    assert_close(merged(deltas, base, IsoCts()), merged(deltas, base), rtol=0, atol=1e-6)
    assert merged(deltas, base).abs().max() > 1e-3


@pytest.mark.parametrize("common", [-0.1, 1.1])
def test_the_common_share_is_checked(common):
    with pytest.raises(InputError, match=f"expected common from 0 to 1 in IsoCts, got {common}"):
        IsoCts(common)
