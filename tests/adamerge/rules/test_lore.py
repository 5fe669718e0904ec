"""An estimated base and low-rank deltas: where the penalised distance is smallest, by its subgradient."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import LoRe, Matrices, Mean, TaskArithmetic, transform


@pytest.fixture
def tv() -> TaskVectors:
    shapes = {"w": (6, 9), "tall": (9, 6), "conv": (4, 3, 2), "bias": (5,)}
    base = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    experts = {t: {name: value + torch.randn_like(value) for name, value in base.items()} for t in "abc"}
    return TaskVectors.from_state_dicts(base, experts)


def test_no_other_base_and_deltas_are_better(tv):
    penalty = 3.0
    after = transform(tv, [LoRe(penalty, steps=100)])
    for name in ("w", "tall"):
        left = torch.stack([tv.expert(t)[name] - after.expert(t)[name] for t in tv.tasks])
        assert_close(left.mean(0), torch.zeros_like(left[0]), rtol=0, atol=1e-9)  # flat in the base
        for own, rest in zip(after.deltas[name], left, strict=True):
            u, s, v = torch.linalg.svd(own, full_matrices=False)
            rank = int((s > 1e-9).sum())
            assert 0 < rank < 6
            # The residual is a subgradient of μ/2 times the nuclear norm.
            assert torch.linalg.svdvals(rest)[0] <= penalty / 2 + 1e-6
            assert_close(u[:, :rank].T @ rest @ v[:rank].T, penalty / 2 * torch.eye(rank).double(), rtol=0, atol=1e-6)


def test_averaged_it_is_the_mean_of_the_experts(tv):
    mean = merge(tv, [Mean()])
    for name, value in merge(tv, [LoRe(2.0, 3), Mean()]).items():
        assert_close(value, mean[name], rtol=0, atol=1e-12)
    assert not torch.allclose(merge(tv, [LoRe(2.0, 3)])["w"], merge(tv, [TaskArithmetic()])["w"], atol=1e-3)


def test_a_large_penalty_leaves_the_mean_as_the_base(tv):
    after, mean = transform(tv, [LoRe(1e3, matrices=Matrices(convolutions=True))]), merge(tv, [Mean()])
    for name in ("w", "tall", "conv"):
        assert not after.deltas[name].any()
        assert_close(after.base[name], mean[name], rtol=0, atol=1e-12)
    assert torch.equal(after.base["bias"], tv.base["bias"])
    assert torch.equal(after.deltas["bias"], tv.deltas["bias"])


@pytest.mark.parametrize("given", [{"penalty": 0.0}, {"steps": 0}])
def test_arguments_are_checked(given):
    with pytest.raises(InputError, match="expected penalty above 0 and steps from 1 on in LoRe"):
        LoRe(**given)
