"""Spectra, overlaps and interference on matrices whose factors are known."""

import pytest
import torch

from adamerge import TaskVectors
from adamerge.inspecting import decompose, decompose_all
from adamerge.inspecting.spectra import evenly, interference, matrices


def bases(side: int, columns: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(side, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn).Q


def test_experts_in_orthogonal_spaces_do_not_interfere():
    left, right = bases(8, 8, 0), bases(6, 6, 1)
    values = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    deltas = torch.stack([(left[:, p] * values) @ right[:, p].T for p in (slice(0, 3), slice(3, 6))])
    found = decompose("w", deltas)
    assert found.rank == 3
    torch.testing.assert_close(found.values[:, :3], values.expand(2, 3))
    torch.testing.assert_close(found.total, torch.tensor([3.0, 3, 2, 2, 1, 1], dtype=torch.float64))
    torch.testing.assert_close(found.left, torch.eye(2, dtype=torch.float64))
    assert found.interference == pytest.approx(0, abs=1e-9)
    assert found.kept.tolist() == pytest.approx([1, 1])


def test_interference_of_identical_experts_in_closed_form():
    """UᵀU − I is (J − I) ⊗ I, and (J − I)² has K − 1 on its diagonal and K − 2 beside it: K (K − 1)² times Σσ."""
    left, right = bases(9, 2, 0), bases(7, 2, 1)
    values = torch.tensor([2.0, 0.5], dtype=torch.float64)
    for count in (1, 2, 3, 4):
        found = interference([left] * count, [values] * count, [right] * count)
        assert found == pytest.approx(count * (count - 1) ** 2 * 2.5, abs=1e-9)
        whole = decompose("w", ((left * values) @ right.T).expand(count, -1, -1))
        torch.testing.assert_close(whole.left, torch.ones(count, count, dtype=torch.float64))
        torch.testing.assert_close(whole.overlap, torch.ones(count, count, dtype=torch.float64))


def test_interference_is_the_definition_written_out():
    generator = torch.Generator().manual_seed(3)
    deltas = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    us, ss, vs = zip(*(torch.linalg.svd(d, full_matrices=False) for d in deltas), strict=True)
    u, v = torch.cat([u[:, :2] for u in us], 1), torch.cat([v[:2].T for v in vs], 1)
    s = torch.diag(torch.cat([s[:2] for s in ss]))
    expected = ((u.T @ u - torch.eye(4)) @ s @ (v.T @ v - torch.eye(4))).abs().sum()
    found = decompose("w", deltas)
    assert found.interference == pytest.approx(float(expected))
    first = torch.linalg.svdvals(us[0][:, :2].T @ us[1][:, :2])
    assert float(found.left[0, 1]) == pytest.approx(float(first.square().mean()))


def test_random_spaces_overlap_and_interfere_by_chance():
    found = decompose("w", torch.randn(4, 96, 64, generator=torch.Generator().manual_seed(0)))
    beside = found.overlap[~torch.eye(4, dtype=torch.bool)]
    assert float(beside.abs().max()) < 0.05
    assert found.relative_interference == pytest.approx(1, abs=0.1)
    low = torch.randn(3, 96, 2, generator=torch.Generator().manual_seed(1)) @ torch.randn(
        3, 2, 64, generator=torch.Generator().manual_seed(2)
    )
    found = decompose("w", low)
    assert found.ranks.tolist() == [2, 2, 2], "of 21"
    assert found.overlap[~torch.eye(3, dtype=torch.bool)].abs().max() < 0.05


def test_zero_and_thin_matrices_are_finite():
    deltas = torch.zeros(3, 4, 2)
    deltas[0, 0, 0] = 1
    found = decompose("w", deltas)
    assert found.left.isfinite().all()
    assert found.kept.tolist() == [1, 0, 0]
    assert found.interference == found.relative_interference == 0
    assert 0 < found.effective_rank <= 1
    assert decompose("w", torch.zeros(2, 3, 3)).effective_rank == pytest.approx(1 / 3)


def test_flat_spectra_have_full_effective_rank():
    assert decompose("w", torch.eye(5).unsqueeze(0)).effective_rank == pytest.approx(1)


def test_weights_of_linear_layers_are_chosen_evenly():
    names = {"embed_tokens.weight": (9, 4), "position_embedding.weight": (7, 4), "norm.weight": (4,)}
    base = {n: torch.zeros(s) for n, s in names.items()} | {
        f"layers.{i}.fc.weight": torch.zeros(4, 4) for i in range(5)
    }
    tv = TaskVectors.from_state_dicts(base, {k: {n: v + 1 for n, v in base.items()} for k in "ab"})
    assert matrices(tv) == [f"layers.{i}.fc.weight" for i in range(5)]
    told: list[str] = []
    assert [found.block for found in decompose_all(tv, 3, told.append)] == ["layers.0", "layers.2", "layers.4"]
    assert len(told) == 3
    assert decompose_all(tv, 0) == []
    assert evenly("abcd", 9) == list("abcd")
    assert evenly("abcd", 1) == ["a"]
