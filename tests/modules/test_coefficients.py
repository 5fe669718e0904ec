import math

import pytest
import torch

from adamerge import InputError, read_coefficients, write_coefficients
from modules import Coefficients

ROWS = ("stem.weight", "blocks.0.fc.weight", "blocks.0.fc.bias", "blocks.1.fc.weight", "norm.weight")
TASKS = ("a", "b", "c")


def bound(**kwargs) -> Coefficients:
    return Coefficients(**kwargs).bind(ROWS, TASKS)


@pytest.mark.parametrize(
    ("grain", "groups"),
    [
        ("model", ["model"]),
        ("block", ["stem", "blocks.0", "blocks.1", "norm"]),
        ("tensor", list(ROWS)),
    ],
)
def test_grain_decides_which_tensors_share_a_row(grain, groups):
    coefficients = bound(grain=grain)
    assert list(coefficients.groups) == groups
    assert coefficients.raw.shape == (len(groups), 3)
    with torch.no_grad():
        coefficients.raw.copy_(torch.arange(coefficients.raw.numel()).view_as(coefficients.raw))
    values = coefficients.by_tensor()
    assert list(values) == list(ROWS)
    same = torch.equal(values["blocks.0.fc.weight"], values["blocks.0.fc.bias"])
    assert same == (grain != "tensor")


@pytest.mark.parametrize(
    ("name", "function"),
    [("none", lambda x: x), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("softmax", lambda x: x.softmax(1))],
)
def test_bounds_map_raw_values(name, function):
    coefficients = bound(bound=name)
    with torch.no_grad():
        coefficients.raw.copy_(torch.randn(5, 3))
    torch.testing.assert_close(coefficients(), function(coefficients.raw))


@pytest.mark.parametrize("name", ["none", "clamp", "sigmoid", "tanh"])
def test_start_is_what_was_asked_for_under_every_bound(name):
    torch.testing.assert_close(bound(bound=name)(), torch.full((5, 3), 0.3))
    torch.testing.assert_close(bound(bound=name, init=[0.1, 0.2, 0.6])()[2], torch.tensor([0.1, 0.2, 0.6]))


def test_softmax_starts_at_the_mean():
    torch.testing.assert_close(bound(bound="softmax")(), torch.full((5, 3), 1 / 3))
    torch.testing.assert_close(bound(bound="softmax", init=[0.5, 0.3, 0.2])()[0], torch.tensor([0.5, 0.3, 0.2]))


def test_clamp_lets_a_value_come_back_but_not_leave_further():
    coefficients = bound(bound="clamp")
    with torch.no_grad():
        coefficients.raw[0] = torch.tensor([-0.5, 1.5, 0.5])
    assert coefficients()[0].tolist() == [0, 1, 0.5]
    for sign, expected in ((1.0, [0, 1, 1]), (-1.0, [-1, 0, -1])):  # descent moves against the gradient
        coefficients.raw.grad = None
        (sign * coefficients()[0].sum()).backward()
        assert coefficients.raw.grad[0].tolist() == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bound": "softmax", "init": 0.3}, r"sum to 1 over the tasks, such as 1/K = 0\.3333"),
        ({"bound": "sigmoid", "init": 1.0}, r"init 1 is not possible under bound 'sigmoid'"),
        ({"bound": "tanh", "init": -1.0}, r"numbers in \(-1, 1\)"),
        ({"bound": "clamp", "init": [0.1, 1.2, 0.3]}, r"init 1\.2 is not possible under bound 'clamp'"),
        ({"init": [0.1, 0.2]}, r"init has shape \[2\]; expected one number, 3 numbers"),
        ({"init": math.nan}, "any number"),
    ],
)
def test_impossible_starts_are_named(kwargs, message):
    with pytest.raises(InputError, match=message):
        bound(**kwargs)


def test_no_difference_no_coefficients():
    with pytest.raises(InputError, match="nothing to merge"):
        Coefficients().bind((), TASKS)


def test_coefficients_belong_to_one_model():
    with pytest.raises(InputError, match="belong to another"):
        bound().bind(ROWS, TASKS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_never_less_than_float32(dtype):
    assert Coefficients().bind(ROWS, TASKS, dtype).raw.dtype == torch.float32


def test_a_file_of_coefficients_is_a_start(tmp_path):
    first = bound()
    with torch.no_grad():
        first.raw.copy_(torch.randn(5, 3))
    write_coefficients(first.table({"base": "0" * 64}), tmp_path / "c.json")
    again = Coefficients(init=str(tmp_path / "c.json")).bind(ROWS, ("c", "a", "b"))  # by name, not by position
    torch.testing.assert_close(again()[:, [1, 2, 0]], first(), rtol=0, atol=0)
    assert read_coefficients(tmp_path / "c.json").rows["norm.weight"]["b"] == first()[4, 1].item()
    with pytest.raises(InputError, match=r"no row for head\.weight"):
        Coefficients(init=str(tmp_path / "c.json")).bind((*ROWS, "head.weight"), TASKS)


def test_values_can_be_fixed_for_a_while():
    coefficients, values = bound(), torch.rand(5, 3)
    with coefficients.at(values):
        torch.testing.assert_close(coefficients(), values)
    torch.testing.assert_close(coefficients(), torch.full((5, 3), 0.3))
