"""Decompositions by Gram matrices: as exact as those of LAPACK where a Gram matrix can be, and 0 where it cannot."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError
from adamerge.linalg import leading, polar


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=rng, dtype=torch.float64)).Q


def graded(rows: int, columns: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with those singular values, and its polar factor."""
    left, right = orthonormal(rows, len(values)), orthonormal(columns, len(values), 1)
    return left * values @ right.T, left @ right.T


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9), (1, 5), (5, 1)])
def test_leading_singular_values(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = max(1, len(s) - 1)
    left, values, right = leading(matrix, rank, "w")
    assert_close(values, s[:rank], rtol=1e-12, atol=0)
    assert_close(left * values @ right, (u * s)[:, :rank] @ v[:rank], rtol=0, atol=1e-12)
    assert_close(left.T @ left, torch.eye(rank).double(), rtol=0, atol=1e-12)
    assert_close(right @ right.T, torch.eye(rank).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 12), (20, 12), (12, 20)])
@pytest.mark.parametrize("condition", [10, 400, 1e4, 1e6])
def test_polar_factors_are_exact_beyond_what_a_gram_matrix_resolves(shape, condition):
    matrix, expected = graded(*shape, torch.logspace(0, -torch.tensor(condition).log10(), 12, dtype=torch.float64))
    factor, values = polar(matrix, "w")
    # A plain Δ (ΔᵀΔ)^-½ is off by ε · condition², and is taken as far as 500; every method is off by ε · condition.
    assert_close(factor, expected, rtol=0, atol=1e-14 * condition if condition > 500 else 1e-15 * condition**2)
    assert_close(factor @ factor.T if shape[0] < shape[1] else factor.T @ factor, torch.eye(12).double())
    assert values.min() > 0


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_directions_that_are_not_there_are_left_out(shape):
    matrix, expected = graded(*shape, torch.tensor([3.0, 2.0, 1.0]).double())
    factor, values = polar(matrix + 1e-13 * torch.randn(shape).double(), "w")
    assert_close(factor, expected, rtol=0, atol=1e-11)
    assert_close(values, torch.tensor([3.0, 2, 1, 0, 0, 0, 0, 0]).double())
    factor, values = polar(matrix, "w", least=1.5)
    assert (values > 0).sum() == 2
    assert torch.linalg.matrix_rank(factor) == 2
    left, values, right = leading(matrix, 4, "w", least=1.5)
    for part in (values > 0, left.any(0), right.any(1)):
        assert part.tolist() == [True, True, False, False]


@pytest.mark.parametrize("function", [lambda m: polar(m, "w"), lambda m: leading(m, 3, "w")])
def test_batches(function):
    matrices = torch.randn(4, 7, 5)
    together, alone = function(matrices), [function(matrix) for matrix in matrices]
    for i, part in enumerate(together):
        assert part.dtype == torch.float64
        assert_close(part.abs(), torch.stack([each[i] for each in alone]).abs(), rtol=0, atol=1e-12)


def test_zeros():
    for part in (*polar(torch.zeros(4, 3), "w"), *leading(torch.zeros(3, 4), 2, "w")):
        assert not part.any()


def test_what_does_not_converge_falls_back_says_so_and_is_named(monkeypatch):
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    matrix = torch.randn(6, 4)
    expected = polar(matrix, "w")[0]
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.warns(UserWarning, match=r"fc\.weight: no eigendecomposition of its Gram matrix was found"):
        assert_close(polar(matrix, "fc.weight")[0], expected)
    monkeypatch.setattr(torch.linalg, "svd", fail)
    with (
        pytest.warns(UserWarning, match="slower"),
        pytest.raises(InputError, match=r"fc\.weight has no singular value decomposition"),
    ):
        leading(matrix, 2, "fc.weight")
