"""Objectives as functions of logits: closed forms, bounds and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from adamerge.objectives import (
    cross_entropy,
    entropy,
    js,
    kept_mean,
    kl,
    marginal_entropy,
    pseudo_label,
    worth_learning,
)

BINARY = [pseudo_label, kl, js]


def logits(size: int = 6, classes: int = 5, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(size, classes, dtype=torch.float64)


def log_of(*rows: list[float]) -> Tensor:
    """Logits of given distributions."""
    return torch.tensor(rows, dtype=torch.float64).log()


def test_entropy_of_known_distributions():
    expected = torch.tensor([math.log(4), math.log(2), 0.0], dtype=torch.float64)
    x = torch.tensor([[2.0, 2, 2, 2], [50, 50, -900, -900], [900, 0, 0, 0]], dtype=torch.float64)
    assert_close(entropy(x), expected)
    p = x.softmax(-1)
    assert_close(entropy(x, eps=1e-8), -(p * (p + 1e-8).log()).sum(-1))


def test_marginal_entropy_is_that_of_the_mean_prediction():
    x = logits()
    p = x.softmax(-1).mean(0)
    assert_close(marginal_entropy(x), -(p * p.log()).sum())
    sure = 900 * torch.eye(4, dtype=torch.float64)
    assert_close(marginal_entropy(sure), torch.tensor(math.log(4), dtype=torch.float64))
    assert_close(marginal_entropy(sure[:1].expand(3, -1)), torch.tensor(0.0, dtype=torch.float64))
    assert marginal_entropy(x) >= entropy(x).mean()  # concavity


def test_one_images_marginal_entropy_is_its_entropy():
    x = logits(1)
    assert_close(marginal_entropy(x), entropy(x)[0])


def test_cross_entropy_and_pseudo_labels():
    x, teacher = log_of([0.5, 0.3, 0.2], [0.1, 0.1, 0.8]), log_of([0.2, 0.5, 0.3], [0.3, 0.3, 0.4])
    expected = -torch.tensor([0.3, 0.8], dtype=torch.float64).log()
    assert_close(cross_entropy(x, torch.tensor([1, 2])), expected)
    assert_close(pseudo_label(x, teacher), expected)
    assert_close(pseudo_label(x, 7 * teacher), expected)  # the label alone counts


def test_what_is_worth_learning():
    sure, less, other = [0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.1, 0.7, 0.2]
    pairs = [(sure, less), (less, sure), (sure, other), (less, other), ([0.1, 0.7, 0.2], [0.7, 0.1, 0.2])]
    own, teacher = (log_of(*rows) for rows in zip(*pairs, strict=True))
    assert worth_learning(own, teacher).tolist() == [True, True, False, True, True]


def test_kl_is_that_of_torch_at_every_temperature():
    own, teacher = logits(), logits()
    for temperature in (0.5, 1.0, 3.0):
        log_p, log_q = (own / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
        expected = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        assert_close(kl(own, teacher, temperature), temperature**2 * expected)
        assert (expected > 0).all()


def test_kl_takes_the_teacher_as_the_truth():
    own, teacher = log_of([0.5, 0.5]), log_of([0.25, 0.75])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert_close(kl(own, teacher).item(), expected)


def test_kl_at_a_high_temperature_compares_logits():
    own, teacher = logits(), logits()
    centred = [x - x.mean(-1, keepdim=True) for x in (own, teacher)]
    expected = (centred[0] - centred[1]).square().mean(-1) / 2
    assert_close(kl(own, teacher, 1e4), expected, rtol=1e-2, atol=0)


def test_js_is_symmetric_bounded_and_zero_on_equal():
    own, teacher = logits(50), logits(50)
    assert_close(js(own, teacher), js(teacher, own))
    assert ((js(own, teacher) > 0) & (js(own, teacher) < math.log(2))).all()
    p, q = own.softmax(-1), teacher.softmax(-1)
    m = (p + q) / 2
    expected = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
    assert_close(js(own, teacher), expected)
    far = torch.tensor([[900.0, 0, 0], [0, 900.0, 0]], dtype=torch.float64)
    assert_close(js(far, far.flip(0)), torch.full((2,), math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("divergence", [kl, js])
def test_divergences_of_equal_logits_are_zero_and_flat(divergence):
    own = logits().requires_grad_()
    value = divergence(own, own.detach() + 2.0)  # a constant changes no distribution
    assert_close(value, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-12)
    value.sum().backward()
    assert_close(own.grad, torch.zeros_like(own), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", BINARY)
def test_gradcheck_with_a_teacher(function):
    teacher = logits(3)
    assert torch.autograd.gradcheck(lambda x: function(x, teacher), (logits(3).requires_grad_(),))


@pytest.mark.parametrize("function", [entropy, marginal_entropy])
def test_gradcheck_without_a_teacher(function):
    assert torch.autograd.gradcheck(function, (logits(3).requires_grad_(),))


def test_half_precision_is_computed_in_single():
    own, teacher = logits().bfloat16(), logits().bfloat16()
    labels = torch.zeros(6, dtype=torch.long)
    results = [entropy(own), marginal_entropy(own), cross_entropy(own, labels)]
    results += [function(own, teacher) for function in BINARY]
    assert {result.dtype for result in results} == {torch.float32}
    assert_close(entropy(own), entropy(own.float()))


def test_kept_mean_is_the_mean_of_what_is_kept():
    losses = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    kept = kept_mean(losses, torch.tensor([True, False, True]))
    assert kept.shape == losses.shape
    kept.mean().backward()
    assert_close(kept.mean().item(), 3.5)
    assert losses.grad.tolist() == [0.5, 0.0, 0.5]
    assert_close(kept_mean(losses, torch.ones(3, dtype=torch.bool)), losses)


def test_kept_mean_of_nothing_is_zero_with_a_gradient_of_zero():
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    kept = kept_mean(losses, torch.zeros(2, dtype=torch.bool))
    kept.mean().backward()
    assert kept.tolist() == [0.0, 0.0]
    assert losses.grad.tolist() == [0.0, 0.0]


def test_what_is_dropped_may_be_anything():
    losses = torch.tensor([torch.inf, torch.nan, 2.0])
    assert kept_mean(losses, torch.tensor([False, False, True])).mean() == 2.0
