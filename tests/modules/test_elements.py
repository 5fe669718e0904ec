"""Element-wise masks and residuals: limits, gradients, what is evaluated and exported."""

import pytest
import torch

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import TaskArithmetic
from modules import Coefficients, ConcreteMask, MergedModel, Residual


@pytest.fixture
def vectors(base, experts):
    return TaskVectors.from_state_dicts(base, experts)


def merged(model, vectors, elements):
    return MergedModel(model, vectors, Coefficients("tensor", init=0.3), elements=elements)


@pytest.mark.parametrize("elements", [ConcreteMask, Residual])
def test_at_the_start_nothing_changes(model, vectors, elements):
    state = merged(model, vectors, elements()).merged_state_dict()
    for name, value in merge(vectors, [TaskArithmetic()], 0.3).items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-15)


def test_a_residual_is_added_as_it_is(model, vectors):
    wrapped = merged(model, vectors, Residual())
    before = wrapped.merged_state_dict()
    with torch.no_grad():
        wrapped.elements.of("0.weight").fill_(0.25)
    after = wrapped.merged_state_dict()
    torch.testing.assert_close(after["0.weight"], before["0.weight"] + 0.25, rtol=0, atol=1e-15)
    torch.testing.assert_close(after["2.weight"], before["2.weight"], rtol=0, atol=0)


def test_a_mask_has_mean_one_over_every_tensor(model, vectors):
    mask = ConcreteMask()
    merged(model, vectors, mask)
    with torch.no_grad():
        mask.of("0.weight").normal_()
    for drawing in (False, True):
        mask.train(drawing)
        assert mask("0.weight", torch.ones(8, 6).double()).mean().item() == pytest.approx(1, abs=1e-12)


def test_towards_zero_temperature_a_mask_keeps_or_drops(model, vectors):
    mask = ConcreteMask(temperature=1e-4)
    merged(model, vectors, mask)
    with torch.no_grad():
        x = mask.of("0.weight").normal_()
        kept = mask("0.weight", torch.ones(8, 6).double())
    expected = (x > 0).double()
    torch.testing.assert_close(kept, expected / expected.mean())


def test_a_mask_is_random_while_it_learns_alone(model, vectors):
    wrapped, x = merged(model, vectors, ConcreteMask()), torch.randn(3, 6).double()
    assert not torch.equal(wrapped(x), wrapped(x))
    with torch.no_grad():
        assert torch.equal(wrapped(x), wrapped(x))
    wrapped.elements.eval()
    torch.testing.assert_close(wrapped(x), wrapped.materialise()(x), rtol=0, atol=0)


@pytest.mark.parametrize("elements", [ConcreteMask, Residual])
def test_gradient(model, vectors, elements):
    wrapped, x = merged(model, vectors, elements()), torch.randn(3, 6).double()
    values = [p.detach().clone().normal_().requires_grad_() for p in wrapped.elements.parameters()]

    def outputs(*values):
        torch.manual_seed(1)
        changes = dict(zip(wrapped.coefficients.rows, values, strict=True))
        with torch.no_grad():
            for name, value in changes.items():
                wrapped.elements.of(name).copy_(value)
        loss = wrapped(x).square().sum()
        grads = torch.autograd.grad(loss, [wrapped.elements.of(name) for name in changes])
        return loss.detach(), grads

    _, grads = outputs(*values)
    for place in range(len(values)):
        nudge = 1e-6 * torch.randn_like(values[place])
        up, down = list(values), list(values)
        up[place], down[place] = values[place] + nudge, values[place] - nudge
        change = outputs(*up)[0] - outputs(*down)[0]
        assert change == pytest.approx(float(2 * (grads[place] * nudge).sum()), rel=1e-5)


def test_coefficients_learn_behind_a_mask(model, vectors):
    wrapped, x = merged(model, vectors, ConcreteMask()), torch.randn(3, 6).double()
    wrapped.elements.eval()
    with torch.no_grad():
        for p in wrapped.elements.parameters():
            p.normal_()

    def loss(raw):
        wrapped.coefficients.raw.data = raw
        return wrapped(x).square().sum()

    raw = wrapped.coefficients.raw.detach().clone()
    (grad,) = torch.autograd.grad(loss(raw), wrapped.coefficients.raw)
    nudge = 1e-6 * torch.randn_like(raw)
    change = loss(raw + nudge).detach() - loss(raw - nudge).detach()
    assert change == pytest.approx(float(2 * (grad * nudge).sum()), rel=1e-5)


def test_an_evaluated_merge_follows_the_elements(model, vectors):
    wrapped, x = merged(model, vectors, Residual()), torch.randn(3, 6).double()
    with torch.no_grad():
        before = wrapped(x)
        wrapped.elements.of("0.weight").add_(1)
        assert not torch.equal(wrapped(x), before)


def test_wrong_use_is_refused(model, vectors):
    mask = ConcreteMask()
    merged(model, vectors, mask)
    with pytest.raises(InputError, match="this ConcreteMask belongs to another merged model already"):
        merged(model, vectors, mask)
    with pytest.raises(InputError, match="temperature must be positive, got 0"):
        ConcreteMask(temperature=0)
