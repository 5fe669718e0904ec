"""The projection on the simplex: against its optimality conditions and finite differences, and how rows come back."""

import pytest
import torch
from torch.testing import assert_close

from modules import Coefficients
from modules.bounds import bounded, project

TASKS = ("a", "b", "c")


def test_the_projection_is_the_nearest_point_of_the_simplex():
    """λ is nearest iff row − λ is a constant where λ > 0 and at most that constant elsewhere."""
    rows = 2 * torch.randn(200, 5, dtype=torch.float64)
    value = project(rows)
    assert bool((value >= 0).all())
    assert_close(value.sum(1), torch.ones(200, dtype=torch.float64))
    rest = rows - value
    level = torch.where(value > 0, rest, torch.inf).amin(1, keepdim=True)
    assert_close(torch.where(value > 0, rest, level), level.expand_as(rest))
    assert bool((rest <= level + 1e-12).all())
    assert (value == 0).any(1).sum() > 50  # the case is a case


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
        ([0.5, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]),
        ([2.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
        ([0.9, 0.5, -3.0], [0.7, 0.3, 0]),
    ],
)
def test_projections_by_hand(row, expected):
    assert_close(project(torch.tensor([row])), torch.tensor([expected]))


def test_inside_the_gradient_is_that_of_the_projection():
    rows = (torch.rand(6, 4, dtype=torch.float64) / 10 + torch.randn(6, 1, dtype=torch.float64)).requires_grad_()
    assert bool((project(rows) > 0).all())
    assert torch.autograd.gradcheck(lambda x: bounded("simplex", x), (rows,))


def test_on_a_face_a_gradient_that_leads_back_passes_and_no_other():
    """Of a loss g·λ at λ = (0.7, 0.3, 0): along the face g − mean g of the first two; the third leaves or stays."""
    for third, expected in ((5.0, 0.0), (-5.0, -6.5)):
        row = torch.tensor([[0.9, 0.5, -3.0]], requires_grad=True)
        (bounded("simplex", row) * torch.tensor([1.0, 2.0, third])).sum().backward()
        assert row.grad.tolist() == [[-0.5, 0.5, expected]]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_descent_leaves_a_corner_and_finds_the_minimum_on_the_simplex(optimizer):
    """Of ‖λ − p‖² the minimum is the projection of p, from a corner too."""
    target = torch.tensor([0.1, 0.8, 0.5], dtype=torch.float64)
    coefficients = Coefficients("model", "simplex", [1.0, 0.0, 0.0]).bind(["w"], TASKS, torch.float64)
    steps = optimizer(coefficients.parameters(), lr=0.02)
    for _ in range(600):
        steps.zero_grad()
        (coefficients() - target).square().sum().backward()
        steps.step()
    assert_close(coefficients()[0], project(target[None])[0], rtol=0, atol=1e-5)


def test_the_start_is_the_mean_and_other_points_of_the_simplex_are_possible():
    assert_close(Coefficients("model", "simplex").bind(["w"], TASKS)(), torch.full((1, 3), 1 / 3))
    assert Coefficients("model", "simplex", [0, 1, 0]).bind(["w"], TASKS)().tolist() == [[0, 1, 0]]
