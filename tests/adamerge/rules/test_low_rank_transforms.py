"""Task vectors at a low rank: around the mean of the experts, and by a share of the nuclear norm."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Cart, Matrices, Mean, Star, transform


@pytest.fixture
def tv() -> TaskVectors:
    shapes = {"w": (10, 7), "tall": (7, 10), "conv": (4, 3, 2), "bias": (5,)}
    base = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    experts = {t: {name: value + torch.randn_like(value) for name, value in base.items()} for t in "abc"}
    return TaskVectors.from_state_dicts(base, experts)


def cut(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u * s)[:, :rank] @ v[:rank]


@pytest.mark.parametrize(("rank", "values"), [(0.3, 2), (0.01, 1), (1.0, 7)])
def test_centred_and_truncated(tv, rank, values):
    merged, mean = merge(tv, [Cart(rank)], scale=2.5), merge(tv, [Mean()])
    for name in ("w", "tall"):
        deltas = tv.deltas[name]
        expected = mean[name] + 2.5 * sum(cut(delta - deltas.mean(0), values) for delta in deltas)
        assert_close(merged[name], expected, rtol=0, atol=1e-11)
    for name in ("conv", "bias"):
        assert_close(merged[name], mean[name], rtol=0, atol=1e-13)
    folded = merge(tv, [Cart(rank, Matrices(convolutions=True))], scale=2.5)["conv"]
    deltas = tv.deltas["conv"].flatten(2)
    cuts = sum(cut(delta - deltas.mean(0), max(1, int(rank * 4))) for delta in deltas)
    assert_close(folded, mean["conv"] + 2.5 * cuts.view(4, 3, 2), rtol=0, atol=1e-11)


@pytest.mark.parametrize("keep", [0.01, 0.4, 0.9, 1.0])
def test_the_nuclear_norm_stays_on_the_fewest_directions(tv, keep):
    after = transform(tv, [Star(keep)]).deltas
    for name in ("w", "tall"):
        for delta, old in zip(after[name], tv.deltas[name], strict=True):
            values = torch.linalg.svdvals(old).tolist()
            count = next(q for q in range(1, 8) if sum(values[:q]) >= keep * sum(values) - 1e-12)
            factor = sum(values) / sum(values[:count])
            assert_close(delta, factor * cut(old, count), rtol=0, atol=1e-11)
    for name in ("conv", "bias"):
        assert torch.equal(after[name], tv.deltas[name])


@pytest.mark.parametrize("rule", [Cart, Star], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("share", [0.0, 1.5])
def test_shares_are_checked(rule, share):
    with pytest.raises(InputError, match=rf"above 0 and up to 1 in {rule.__name__}, got {share}"):
        rule(share)
