"""Truncated decompositions: exact where nothing is cut, factors only where they are smaller."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors
from adamerge.deltas import LowRank, dense
from adamerge.rules import TruncatedSVD

SHAPES = {"matrix": (12, 20), "conv": (8, 3, 4, 4), "bias": (12,), "scale": ()}


@pytest.fixture
def tv() -> TaskVectors:
    base = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    return TaskVectors.from_state_dicts(base, {t: {n: torch.randn_like(v) for n, v in base.items()} for t in "abc"})


@pytest.mark.parametrize("rank", [1, 3, 0.25])
def test_matrices_are_cut_to_their_rank(tv, rank):
    after = TruncatedSVD(rank)(tv)
    for name, most in (("matrix", 12), ("conv", 8)):
        wanted = rank if isinstance(rank, int) else int(rank * most)
        factors, matrix = after.deltas[name], tv.deltas[name].flatten(2)
        assert isinstance(factors, LowRank)
        assert factors.left.shape[-1] == wanted
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        expected = (u * torch.where(torch.arange(most) < wanted, s, 0).unsqueeze(1)) @ v
        assert_close(factors.dense().flatten(2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [20, 12, 1.0])
def test_the_whole_rank_is_exact(tv, rank):
    after = TruncatedSVD(rank)(tv)
    assert all(torch.equal(dense(after.deltas[name]), delta) for name, delta in tv.deltas.items())


def test_factors_that_would_be_larger_are_multiplied_out(tv):
    after = TruncatedSVD(11)(tv).deltas["matrix"]
    assert isinstance(after, torch.Tensor)
    assert torch.linalg.matrix_rank(after).tolist() == [11] * 3
    assert_close(after, LowRank.from_dense(tv.deltas["matrix"], 11).dense(), rtol=0, atol=1e-12)
    # 7 · (12 + 20) < 12 · 20 < 8 · (12 + 20)
    assert isinstance(TruncatedSVD(7)(tv).deltas["matrix"], LowRank)
    assert isinstance(TruncatedSVD(8)(tv).deltas["matrix"], torch.Tensor)


def test_what_has_one_axis_or_is_excluded_stays(tv):
    after = TruncatedSVD(1, exclude="^conv")(tv)
    assert isinstance(after.deltas["matrix"], LowRank)
    for name in ("conv", "bias", "scale"):
        assert torch.equal(after.deltas[name], tv.deltas[name])


def test_a_small_fraction_is_rank_one(tv):
    assert TruncatedSVD(0.01)(tv).deltas["matrix"].left.shape[-1] == 1


def test_a_fraction_is_not_lost_to_rounding():
    base = {"w": torch.zeros(100, 400)}
    tv = TaskVectors.from_state_dicts(base, {"a": {"w": torch.randn(100, 400)}})
    assert int(0.29 * 100) == 28
    assert TruncatedSVD(0.29)(tv).deltas["w"].left.shape[-1] == 29


@pytest.mark.parametrize("rank", [0, -3, 0.0, 1.5])
def test_a_rank_that_is_none_is_refused(rank):
    with pytest.raises(InputError, match=f"expected a whole rank from 1 on, .* got {rank}"):
        TruncatedSVD(rank)


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"exclude='\(' in TruncatedSVD is no regular expression"):
        TruncatedSVD(2, exclude="(")
