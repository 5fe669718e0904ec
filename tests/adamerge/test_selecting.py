"""Frank-Wolfe's selection of experts: its steps written out for a linear model, and experts that nobody needs."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import FwMerging
from adamerge.selecting import select, toward_best

TASKS = ("x", "y", "z")


def made() -> tuple[nn.Module, TaskVectors, dict[str, tuple[Tensor, Tensor]]]:
    """A linear model, three experts of it, and labelled data for two tasks, of different sizes."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    base = model.state_dict()
    experts = {t: {n: v + torch.randn_like(v) for n, v in base.items()} for t in TASKS}
    data = {}
    for task, count in (("x", 30), ("y", 7)):
        images = torch.randn(count, 4, dtype=torch.float64)
        data[task] = images, (images @ experts[task]["weight"].T + experts[task]["bias"]).argmax(1)
    return model, TaskVectors.from_state_dicts(base, experts), data


def batches(data):
    return {t: lambda t=t: zip(data[t][0].split(8), data[t][1].split(8), strict=True) for t in data}


def loss(weights: dict[str, Tensor], data) -> Tensor:
    parts = [nn.functional.cross_entropy(x @ weights["weight"].T + weights["bias"], y) for x, y in data.values()]
    return torch.stack(parts).mean()


@pytest.mark.parametrize("per", ["tensor", "model"])
def test_steps_are_those_of_the_paper(per):
    model, tv, data = made()
    shares = {name: torch.full((3,), 1 / 3, dtype=torch.float64) for name in tv.deltas}
    for step in range(4):
        weights = {n: tv.base[n] + torch.tensordot(shares[n], tv.deltas[n], 1) for n in shares}
        weights = {n: w.requires_grad_() for n, w in weights.items()}
        grads = dict(zip(weights, torch.autograd.grad(loss(weights, data), list(weights.values())), strict=True))
        slopes = {n: [float((grads[n] * tv.deltas[n][k]).sum()) for k in range(3)] for n in shares}
        if per == "model":
            slopes = {key: [sum(slopes[n][k] for n in shares) for k in range(3)] for key in slopes}
        for n, share in shares.items():
            best = min(range(3), key=slopes[n].__getitem__)
            if slopes[n][best] < sum(s * c for s, c in zip(slopes[n], share.tolist(), strict=True)):
                gamma = 2 / (step + 2)
                shares[n] = (1 - gamma) * share + gamma * torch.eye(3, dtype=torch.float64)[best]
    rule = FwMerging(steps=4, per=per)
    rule.statistics = found = select(model, tv, batches(data), rule)
    for n, share in shares.items():
        assert_close(torch.stack([found.find("share", task, n) for task in TASKS]), share)
        assert_close(merge(tv, [rule])[n], tv.base[n] + torch.tensordot(share, tv.deltas[n], 1))


def test_the_loss_falls_and_an_expert_that_no_task_needs_is_left_out():
    model, tv, data = made()
    found = select(model, tv, batches(data), FwMerging(steps=60))
    merged = merge(tv, [FwMerging(found)])
    mean = {n: tv.base[n] + tv.deltas[n].mean(0) for n in tv.base}
    assert loss(merged, data) < loss(mean, data)
    alone = select(model, tv, {"x": batches(data)["x"]}, FwMerging(steps=60, per="model"))
    assert float(alone.find("share", "x", "weight")) > 0.8


def test_no_step_where_no_expert_is_better():
    share = torch.tensor([0.0, 1.0, 0.0])
    assert_close(toward_best(share, torch.tensor([3.0, 1.0, 2.0]), 0.5), share)
    assert_close(toward_best(share, torch.tensor([3.0, 1.0, 0.0]), 0.5), torch.tensor([0.0, 0.5, 0.5]))


def test_what_is_missing_is_said():
    model, tv, data = made()
    with pytest.raises(InputError, match="no task was given"):
        select(model, tv, {})
    with pytest.raises(InputError, match="task 'x' has no example"):
        select(model, tv, {"x": list})
    with pytest.raises(InputError, match="needs labels"):
        select(model, tv, {"x": lambda: [data["x"][0]]})
    with pytest.raises(InputError, match="steps from 1 on"):
        FwMerging(steps=0)
    with pytest.raises(InputError, match="FwMerging needs statistics"):
        merge(tv, [FwMerging()])
    found = select(model, tv, batches(data), FwMerging(steps=1))
    del found.observations["z"].tensors["share/bias"]
    with pytest.raises(InputError, match="bias has no share of some expert"):
        merge(tv, [FwMerging(found)])
