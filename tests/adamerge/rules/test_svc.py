"""Calibrated singular values: row by row, and what they make of merges that count directions twice."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import IsoC, Matrices, Mean, Svc, TaskArithmetic, TsvM


def vectors(deltas: Tensor, name: str = "w") -> TaskVectors:
    return TaskVectors.from_state_dicts(
        {name: torch.zeros_like(deltas[0])}, {f"t{k}": {name: delta} for k, delta in enumerate(deltas)}
    )


def by_rows(deltas: Tensor, change: Tensor, floor: float) -> Tensor:
    """Σᵢ γᵢ σᵢ uᵢ vᵢᵀ, number by number."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    calibrated = torch.zeros_like(change)
    for i in range(len(s)):
        ratios = []
        for delta in deltas:
            row = u[:, i] @ delta
            ratios.append(max(floor, float(s[i] * v[i] @ row / (row @ row))))
        calibrated += len(ratios) / sum(ratios) * s[i] * torch.outer(u[:, i], v[i])
    return calibrated


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6), (2, 5, 5)])
@pytest.mark.parametrize("floor", [0.1, 1.0])
@pytest.mark.parametrize("rule", [TaskArithmetic(), Mean(), TsvM()], ids=lambda rule: type(rule).__name__)
def test_every_direction_is_calibrated(shape, floor, rule):
    deltas = torch.randn(shape, dtype=torch.float64)
    change = merge(vectors(deltas), [rule])["w"]
    assert_close(merge(vectors(deltas), [rule, Svc(floor)])["w"], by_rows(deltas, change, floor), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_the_merge_is_calibrated_with_its_scale(scale):
    """Task arithmetic at some scale, then calibrated: what is no matrix keeps the scale."""
    deltas, vector = torch.randn(3, 6, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    found = merge(vectors(deltas), [TaskArithmetic(), Svc()], scale)["w"]
    assert_close(found, by_rows(deltas, scale * deltas.sum(0), 0.1), rtol=0, atol=1e-10)
    assert not torch.allclose(found, scale * merge(vectors(deltas), [TaskArithmetic(), Svc()])["w"], atol=1e-2)
    assert_close(merge(vectors(vector), [TaskArithmetic(), Svc()], scale)["w"], scale * vector.sum(0))


def test_a_factor_on_the_merge_cancels():
    shared, own = torch.randn(2, 6, 6, dtype=torch.float64).abs(), torch.rand(3, 6, 6, dtype=torch.float64) / 50
    deltas = shared[0] + own
    tv = vectors(deltas)
    found = merge(tv, [TaskArithmetic(), Svc(1e-9)])["w"]
    assert_close(merge(tv, [Mean(), Svc(1e-9)])["w"], found, rtol=0, atol=1e-9)
    assert not torch.allclose(merge(tv, [Mean(), Svc(1.0)])["w"], found, atol=1e-3)


def test_what_experts_share_counts_once_and_what_is_ones_own_fully():
    u, v = (torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q for _ in range(2))
    common, first, second = (torch.outer(u[:, i], v[:, i]) for i in range(3))
    deltas = torch.stack([3 * common + 2 * first, 3 * common + second])
    merged = merge(vectors(deltas), [TaskArithmetic(), Svc()])["w"]
    assert_close(merged, 3 * common + 2 * first + second, rtol=0, atol=1e-12)


def test_identical_experts_are_that_expert():
    delta = torch.randn(6, 9, dtype=torch.float64)
    assert_close(merge(vectors(delta.expand(4, 6, 9)), [TaskArithmetic(), Svc()])["w"], delta, rtol=0, atol=1e-12)


def test_what_is_no_matrix_stays():
    deltas = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(merge(vectors(deltas), [TaskArithmetic(), Svc()])["w"], deltas.sum(0))
    embeddings = torch.randn(3, 4, 5, dtype=torch.float64)
    rules = [TaskArithmetic(), Svc(matrices=Matrices(average="embed"))]
    assert torch.equal(merge(vectors(embeddings, "embed"), rules)["embed"], embeddings.sum(0))
    assert not torch.allclose(merge(vectors(embeddings), rules)["w"], embeddings.sum(0), atol=1e-3)


def test_flat_spectra_stay_finite():
    assert merge(vectors(torch.randn(3, 6, 6)), [IsoC(), Svc()])["w"].isfinite().all()


def test_a_floor_of_zero_is_refused():
    with pytest.raises(InputError, match="expected floor > 0 in Svc, got 0"):
        Svc(0)
