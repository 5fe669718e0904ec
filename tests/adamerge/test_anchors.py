"""Anchors: the gradient they induce, in closed form, and how far it turns towards the task vector."""

import pytest
import torch
from torch.func import functional_call
from torch.testing import assert_close

from adamerge.anchors import alignment, find_anchors, similarity


def linear(state, x):
    return x @ state["w"].T


@pytest.fixture
def states():
    base = {"w": torch.randn(4, 3).double(), "same": torch.ones(2).double()}
    return base, {"w": base["w"] + 0.1 * torch.randn(4, 3).double(), "same": torch.ones(2).double()}


def test_similarity_is_one_for_what_has_one_direction():
    x = torch.randn(3, 2, 4)
    assert_close(similarity(2 * x, x), torch.ones(3))
    assert_close(similarity(-x, x), -torch.ones(3))
    assert similarity(x.bfloat16(), x.bfloat16()).dtype == torch.float32


def test_alignment_of_a_linear_map_in_closed_form(states):
    """y = W₀ x, t = Wₖ x: ∇ cos(y, t) = (t/‖t‖ − cos · y/‖y‖) xᵀ / ‖y‖."""
    base, expert = states
    x = torch.randn(1, 3).double()
    y, t = linear(base, x)[0], linear(expert, x)[0]
    cos = y @ t / y.norm() / t.norm()
    gradient = torch.outer(t / t.norm() - cos * y / y.norm(), x[0]) / y.norm()
    tau = expert["w"] - base["w"]
    expected = (gradient * tau).sum() / gradient.norm() / tau.norm()
    assert_close(alignment(linear, base, expert, x), expected[None])  # one tensor: the other one did not change


def test_alignment_is_differentiable_in_the_inputs(states):
    x = torch.randn(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: alignment(linear, *states, x), (x,))


def test_a_rank_one_task_vector_is_found(states):
    """Of W₀ + u vᵀ, every gradient is along u' vᵀ: anchors along v align with it as far as the cosine allows."""
    base = {"w": torch.eye(4).double()}
    u, v = torch.randn(4).double(), torch.randn(4).double()
    found = find_anchors(
        linear, base, {"w": base["w"] + 1e-4 * torch.outer(u, v)}, torch.randn(8, 4).double(), 100, 3e-2
    )
    assert found.before < 0.8
    assert found.after > 0.95


def test_attention_and_norms_are_differentiated_twice():
    from adamerge.backbones import Block

    block = Block(8, 2, 2.0).double()
    base = {name: value.detach() for name, value in block.state_dict().items()}
    expert = {name: value + 0.05 * torch.randn_like(value) for name, value in base.items()}
    start = 0.01 * torch.randn(4, 3, 8).double()
    kept = start.clone()
    found = find_anchors(lambda state, x: functional_call(block, state, (x,)), base, expert, start, 30)
    assert found.after > found.before + 0.1
    assert torch.equal(start, kept)
    again = alignment(lambda state, x: functional_call(block, state, (x,)), base, expert, found.inputs)
    assert_close(again.mean().item(), found.after)


def test_without_a_task_vector_the_start_stays(states):
    start = torch.randn(2, 3).double()
    found = find_anchors(linear, states[0], states[0], start, 5)
    assert found.inputs is start
    assert (found.before, found.after) == (0.0, 0.0)


def test_no_step_gives_the_start(states):
    start = torch.randn(2, 3).double()
    found = find_anchors(linear, *states, start, 0)
    assert torch.equal(found.inputs, start)
    assert found.before == found.after
