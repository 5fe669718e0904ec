"""Merged models by kernels against torch's own operations: collected where kernels are interpreted on the CPU."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from adamerge import TaskVectors, kernels, ops
from adamerge.deltas import Sparse
from adamerge.stored import Stored
from modules import Coefficients, ConcreteMask, MergedModel, Residual

TASKS = ("a", "b", "c")
X = torch.linspace(-1, 1, 48).view(8, 6)
#: Of the tensors in turn; kernels take all but the last.
FORMS = (
    lambda deltas: deltas,
    lambda deltas: Stored.from_dense(deltas, torch.bfloat16),
    lambda deltas: Stored.from_dense(deltas, torch.int8),
    Sparse.from_dense,
)
KINDS: dict[str, dict[str, Any]] = {
    "tensors": {},
    "columns": {"grain": "column"},
    "some_blocks": {"grain": "block", "only": r"^0\."},
    "mask": {"elements": ConcreteMask},
    "residual_of_some": {"elements": Residual, "only": r"weight$"},
}


def build(elements=None, **kwargs) -> MergedModel:
    """Three layers, of which two share a matrix; no expert changes the last bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    model[2].weight = model[0].weight
    base, experts = model.state_dict(), {}
    for task in TASKS:
        experts[task] = {name: value + 0.1 * torch.randn_like(value) for name, value in base.items()}
        experts[task] |= {"4.bias": base["4.bias"].clone(), "2.weight": experts[task]["0.weight"]}
    vectors = TaskVectors.from_state_dicts(base, experts)
    deltas = {name: form(vectors.deltas[name]) for name, form in zip(vectors.rows, cycle(FORMS), strict=False)}
    vectors = TaskVectors(vectors.base, {**vectors.deltas, **deltas}, TASKS, vectors.tied)
    return MergedModel(model, vectors, Coefficients(**kwargs), elements=elements and elements())


def loss(merged: MergedModel, images: Tensor = X) -> Tensor:
    return merged(images).square().sum()


def grads(merged: MergedModel) -> list[Tensor | None]:
    return [parameter.grad for parameter in merged.parameters()]


def what_is_merged(merged: MergedModel) -> list[Any]:
    return [(name, weight, weight.requires_grad) for name, weight in merged.weights().items()]


def a_step(merged: MergedModel) -> list[Any]:
    value = loss(merged)
    value.backward()
    return [value, grads(merged)]


def two_merges_in_one_loss(merged: MergedModel) -> list[Any]:
    (loss(merged) + loss(merged, X[:3])).backward()
    return grads(merged)


def one_merge_for_many_backward_passes(merged: MergedModel) -> list[Any]:
    learned = list(merged.parameters())
    with merged.holding(merged.weights()):
        losses = [loss(merged, X[:4]), loss(merged, X[4:])]
    found = [torch.autograd.grad(value, learned, retain_graph=True) for value in losses]
    losses[0].backward()
    return [losses, found, grads(merged)]


def micro_batches(merged: MergedModel) -> list[Any]:
    values = merged.in_parts([lambda: loss(merged, X[:4]), lambda: loss(merged, X[4:])])
    torch.stack(values).sum().backward()
    return [values, grads(merged)]


def a_loss_of_one_tensor(merged: MergedModel) -> list[Any]:
    merged.weights()["0.bias"].square().sum().backward()
    return grads(merged)


def no_gradients_and_then_a_step(merged: MergedModel) -> list[Any]:
    with torch.inference_mode():
        first = loss(merged).tolist()
    with torch.no_grad():
        return [torch.tensor(first), loss(merged), merged.merged_state_dict(), torch.enable_grad()(a_step)(merged)]


def coefficients_from_elsewhere(merged: MergedModel) -> list[Any]:
    values = merged.requires_grad_(False).coefficients().clone().requires_grad_()
    with merged.coefficients.at(values), merged.holding(merged._merge()):
        return [loss(merged), torch.autograd.grad(loss(merged), values)]


def hooks_on_weights(merged: MergedModel) -> list[Any]:
    weights = merged.weights()
    weights["0.bias"].register_hook(lambda grad: 2 * grad)
    weights["0.bias"].retain_grad()
    with merged.holding(weights):
        loss(merged).backward()
    return [weights["0.bias"].grad, grads(merged)]


def half_precision(merged: MergedModel) -> list[Any]:
    with torch.autocast("cpu", torch.bfloat16):
        return a_step(merged)


def the_first_merge_within_a_checkpoint(merged: MergedModel) -> list[Any]:
    kernels.work.cache_clear()
    value = checkpoint(lambda images: loss(merged, images), X, use_reentrant=False)
    value.backward()
    return [value, grads(merged)]


def the_first_merge_under_another_default(merged: MergedModel) -> list[Any]:
    kernels.work.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return a_step(merged)
    finally:
        torch.set_default_dtype(torch.float32)


DEEDS = [
    what_is_merged, a_step, two_merges_in_one_loss, one_merge_for_many_backward_passes, micro_batches,
    a_loss_of_one_tensor, no_gradients_and_then_a_step, coefficients_from_elsewhere, hooks_on_weights, half_precision,
    the_first_merge_within_a_checkpoint, the_first_merge_under_another_default,
]  # fmt: skip


def leaves(tree: Any) -> Iterator[Any]:
    if not isinstance(tree, (dict, list, tuple)):
        yield tree
        return
    for branch in tree.items() if isinstance(tree, dict) else tree:
        yield from leaves(branch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_they_do_as_torch_does(deed, kind, monkeypatch):
    launched, original = [], kernels.sums
    monkeypatch.setattr(kernels, "sums", lambda *arguments: launched.append(1) or original(*arguments))
    torch.manual_seed(1)
    by_kernels = list(leaves(deed(build(**KINDS[kind]))))
    assert launched
    assert kernels.work(torch.device("cpu"))
    monkeypatch.setattr(ops, "_in_kernels", lambda *_: False)
    torch.manual_seed(1)
    for mine, plain in zip(by_kernels, leaves(deed(build(**KINDS[kind]))), strict=True):
        if isinstance(plain, Tensor):
            assert_close(mine, plain, rtol=1e-4, atol=1e-5)
        else:
            assert mine == plain
