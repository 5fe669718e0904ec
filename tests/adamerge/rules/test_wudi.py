"""The merge that interferes least: Adam as autograd would have it, and the minimiser in closed form."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Wudi


def merged(deltas: Tensor, rule: Wudi) -> Tensor:
    experts = {f"t{k}": {"w": delta} for k, delta in enumerate(deltas)}
    return merge(TaskVectors.from_state_dicts({"w": torch.zeros_like(deltas[0])}, experts), [rule])["w"]


def loss(change: Tensor, deltas: Tensor) -> Tensor:
    return torch.stack([((change - d) @ d.T).square().sum() / d.square().sum() for d in deltas]).sum()


@pytest.mark.parametrize("shape", [(3, 6, 9), (3, 9, 6), (1, 4, 4)])
def test_adam_with_autograd_takes_the_same_steps(shape):
    deltas = torch.randn(shape, dtype=torch.float64)
    change = deltas.sum(0).requires_grad_()
    optimizer = torch.optim.Adam([change], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss(change, deltas).backward()
        optimizer.step()
    assert_close(merged(deltas, Wudi(30, 1e-2)), change.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("shape", [(3, 6, 9), (2, 3, 8)])
def test_the_closed_form_is_where_the_penalised_loss_is_flat(shape, ridge):
    deltas = torch.randn(shape, dtype=torch.float64)
    change = merged(deltas, Wudi(ridge=ridge)).requires_grad_()
    weight = ridge * shape[0] / shape[2]  # every Gram matrix has trace 1
    (loss(change, deltas) + weight * (change - deltas.sum(0)).square().sum()).backward()
    assert change.grad.abs().max() < 1e-12


def test_a_strong_ridge_is_the_sum_and_a_weak_one_gives_identical_experts_back():
    deltas = torch.randn(3, 6, 9, dtype=torch.float64)
    assert_close(merged(deltas, Wudi(ridge=1e9)), deltas.sum(0), rtol=0, atol=1e-6)
    expert = deltas[:1].expand(4, 6, 9)
    assert_close(merged(expert, Wudi(ridge=1e-9)), expert[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("given", [{"steps": 0}, {"lr": 0.0}, {"ridge": 0.0}])
def test_arguments_are_checked(given):
    with pytest.raises(InputError, match="expected steps, lr and ridge above 0 in Wudi"):
        Wudi(**given)
