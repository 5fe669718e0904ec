"""Shared coordinates: linear rules do not notice them, others are what they are in the basis that is shared."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Drm, ElectSign, KnOts, Lines, Matrices, Mean, ModelStock, Slerp, TaskArithmetic, Trim

SHAPES = {"w": (6, 5), "tall": (12, 3), "conv": (4, 3, 2), "bias": (5,)}


def vectors(deltas: dict[str, Tensor], base: dict[str, Tensor] | None = None) -> TaskVectors:
    base = base or {name: torch.zeros_like(delta[0]) for name, delta in deltas.items()}
    count = len(next(iter(deltas.values())))
    experts = {f"t{k}": {name: base[name] + delta[k] for name, delta in deltas.items()} for k in range(count)}
    return TaskVectors.from_state_dicts(base, experts)


@pytest.fixture
def deltas() -> dict[str, Tensor]:
    return {name: torch.randn(3, *shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def coordinates(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """U and S Vₖᵀ, by LAPACK."""
    u, s, v = torch.linalg.svd(torch.cat(list(deltas), 1), full_matrices=False)
    return u, torch.stack((s.unsqueeze(1) * v).chunk(len(deltas), 1))


@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("rule", [Mean(), TaskArithmetic()], ids=lambda rule: type(rule).__name__)
def test_what_is_linear_is_what_it_is_anyway(deltas, rule, vertical):
    tv, matrices = vectors(deltas), Matrices(convolutions=True)
    assert_close(merge(tv, [KnOts([rule], vertical, matrices)]), merge(tv, [rule]), rtol=0, atol=1e-12)


def test_thresholds_are_over_all_coordinates(deltas):
    bases, moved = {}, {}
    for name, delta in deltas.items():
        bases[name], moved[name] = coordinates(delta) if delta.dim() == 3 else (None, delta)
    rules = [Trim(0.3), ElectSign("mean")]
    expected = merge(vectors(moved), rules)
    merged = merge(vectors(deltas), [KnOts(rules)], scale=0.7)
    for name, basis in bases.items():
        back = expected[name] if basis is None else basis @ expected[name]
        assert_close(merged[name], 0.7 * back, rtol=0, atol=1e-12)
    assert not torch.allclose(merged["w"], 0.7 * merge(vectors(deltas), rules)["w"], atol=1e-3)


def test_vertical_is_horizontal_turned(deltas):
    rules = [ElectSign("sum")]
    turned = {"w": deltas["w"].mT.contiguous()}
    across = merge(vectors({"w": deltas["w"]}), [KnOts(rules, vertical=True)])["w"]
    assert_close(across, merge(vectors(turned), [KnOts(rules)])["w"].T, rtol=0, atol=1e-12)


def test_coordinates_are_as_many_as_the_rank():
    """Rank 1 each, in float32: a fifth of all coordinates is a fifth of 3 rows, not of 30."""
    base = {"w": torch.randn(30, 30)}
    exact = {"w": torch.stack([torch.outer(torch.randn(30), torch.randn(30).double()) / 1000 for _ in range(3)])}
    rules = [Trim(0.2), ElectSign("sum")]
    merged = merge(vectors({"w": exact["w"].float()}, base), [KnOts(rules)])["w"] - base["w"]
    u, moved = coordinates(exact["w"])
    expected = u[:, :3] @ merge(vectors({"w": moved[:, :3].contiguous()}), rules)["w"]
    assert_close(merged, expected.float(), rtol=0, atol=1e-5)
    assert expected.abs().max() > 1e-3


def test_rules_over_weights_and_corrections_are_refused():
    for rules, name in (([Slerp()], "Slerp"), ([Mean(), Lines()], "Lines")):
        with pytest.raises(InputError, match=f"{name} does not work in the coordinates of KnOts"):
            KnOts(rules)
    assert KnOts([ModelStock()])


def by_entries(deltas: Tensor, keep: float) -> Tensor:
    """DRM, entry by entry."""
    u, moved = coordinates(deltas)
    rows = [r for r in range(moved.shape[1]) if moved[:, r].norm() > 1e-2 * moved[:, 0].norm()]
    share = {(k, r): (moved[k, r] / moved[k, r].norm()).abs().tolist() for k in range(len(deltas)) for r in rows}
    ordered = sorted((x for row in share.values() for x in row), reverse=True)
    threshold = ordered[round(keep * len(ordered)) - 1]
    merged = torch.zeros_like(moved[0])
    for r in rows:
        for j in range(moved.shape[2]):
            left = [float(moved[k, r, j]) for k in range(len(deltas)) if share[k, r][j] >= threshold]
            agree = [x for x in left if x * sum(left) > 0]
            merged[r, j] = sum(agree) / max(1, len(agree))
    return u @ merged


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 6, 5), (2, 12, 3)])
def test_drm(keep, shape):
    deltas = torch.randn(shape, dtype=torch.float64)
    deltas[:, 0] *= 1e-3
    assert_close(merge(vectors({"w": deltas}), [Drm(keep)])["w"], by_entries(deltas, keep), rtol=0, atol=1e-11)
    across = merge(vectors({"w": deltas.mT.contiguous()}), [Drm(keep, vertical=True)])["w"]
    assert_close(across.T, by_entries(deltas, keep), rtol=0, atol=1e-11)


def test_drm_trims_what_is_no_matrix_over_all_of_it():
    """Two tensors of which each expert keeps its largest 20 %, from the 12th of fifteen on; signs by hand."""
    deltas = {
        "bias": torch.tensor([[9.0, -8, 7, 0, 0, 0, 0, 0, 0, 0], [5.0, 6, 1, 0, 0, 0, 0, 0, 0, 0]]).double(),
        "embed.weight": torch.tensor([[[1.0, 2, 3, 4, 5]], [[-1.0, 4, 0, 0, 0]]]).double(),
        "w": 100 * torch.randn(2, 4, 4, dtype=torch.float64),
    }
    merged = merge(vectors(deltas), [Drm(0.2)])
    assert merged["bias"].tolist() == [7.0, -8.0, 4.0, *[0] * 7]
    assert merged["embed.weight"].tolist() == [[-1, 4, 0, 0, 5]]


@pytest.mark.parametrize("keep", [0.0, 1.2])
def test_the_share_is_checked(keep):
    with pytest.raises(InputError, match=f"expected keep above 0 and up to 1 in Drm, got {keep}"):
        Drm(keep)
