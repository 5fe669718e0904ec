"""A shared shift: Adam as autograd would have it, off the common directions, under masks over all matrices."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Doge


def vectors(deltas: dict[str, Tensor]) -> TaskVectors:
    count = len(next(iter(deltas.values())))
    experts = {f"t{k}": {name: delta[k] for name, delta in deltas.items()} for k in range(count)}
    return TaskVectors.from_state_dicts({name: torch.zeros_like(delta[0]) for name, delta in deltas.items()}, experts)


def shift_by_autograd(deltas: Tensor, weights: Tensor, subspace: float, steps: int, lr: float) -> Tensor:
    rank = min(deltas.shape[1:])
    lefts = [torch.linalg.svd(delta, full_matrices=False).U[:, : rank // len(deltas)] for delta in deltas]
    common = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False).U[:, : int(rank / subspace)]
    shift = torch.zeros_like(deltas[0]).requires_grad_()
    optimizer = torch.optim.Adam([shift], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        merged = sum(weight * (delta + shift) for weight, delta in zip(weights, deltas, strict=True))
        loss = sum((delta * (delta - merged)).sum(1).square().sum() for delta in deltas)
        loss.backward()
        shift.grad -= common @ common.T @ shift.grad
        optimizer.step()
    return shift.detach()


@pytest.mark.parametrize("subspace", [2.0, 6.0, 100.0])
@pytest.mark.parametrize("shape", [(3, 6, 9), (2, 9, 6)])
def test_adam_with_autograd_takes_the_same_steps(shape, subspace):
    deltas = torch.randn(shape, dtype=torch.float64)
    weights = torch.stack([0.07 / delta.norm() for delta in deltas])
    shift = shift_by_autograd(deltas, weights, subspace, 20, 1e-2)
    expected = sum(weight * (delta + shift) for weight, delta in zip(weights, deltas, strict=True))
    found = merge(vectors({"w": deltas}), [Doge(keep=1.0, subspace=subspace, steps=20, lr=1e-2)])["w"]
    assert_close(found, expected, rtol=0, atol=1e-10)
    assert shift.abs().max() > 0.05


def test_masks_are_over_all_matrices_and_of_the_experts():
    deltas = {"small": torch.randn(2, 6, 9), "large": 3 * torch.randn(2, 6, 9), "bias": 9 * torch.randn(2, 50)}
    merged = merge(vectors(deltas), [Doge(keep=0.3, steps=1)])
    whole = torch.cat([deltas["small"].flatten(1), deltas["large"].flatten(1)], 1).abs()
    least = whole.sort(1).values[:, 108 - int(0.3 * 108) - 1].view(2, 1, 1)
    for name in ("small", "large"):
        kept = (deltas[name].abs() >= least).any(0)
        assert torch.equal(merged[name] != 0, kept)
    assert not merged["bias"].any()


@pytest.mark.parametrize("given", [{"eta": 0.0}, {"subspace": 0.5}, {"steps": 0}, {"lr": 0.0}])
def test_arguments_are_checked(given):
    with pytest.raises(InputError, match="expected eta and lr above 0, subspace and steps from 1 on in Doge"):
        Doge(**given)
