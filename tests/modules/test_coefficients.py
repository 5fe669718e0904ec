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
        ({"bound": "simplex", "init": 0.3}, r"sum to 1 over the tasks, such as 1/K = 0\.3333, none of them negative"),
        ({"bound": "simplex", "init": [1.5, -0.5, 0.0]}, "init -0.5 is not possible under bound 'simplex'"),
        ({"only": "attn"}, "no tensor matches only='attn': nothing learns; there is stem.weight, for one"),
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


# -- a coefficient per column ----------------------------------------------------------------------------------------

SHAPES = {"stem.weight": (4, 3, 2, 2), "blocks.0.fc.weight": (5, 4), "blocks.0.fc.bias": (5,)}
SHAPES |= {"blocks.1.fc.weight": (4, 1), "norm.weight": ()}


def columns(**kwargs) -> Coefficients:
    return Coefficients("column", **kwargs).bind(ROWS, TASKS, shapes=SHAPES)


def test_every_column_of_a_matrix_has_a_row_and_every_vector_one():
    coefficients = columns()
    assert coefficients.groups == ROWS
    assert coefficients.raw.shape == (3 + 4 + 1 + 1 + 1, 3)
    with torch.no_grad():
        coefficients.raw.copy_(torch.randn(10, 3))
    values = coefficients.by_tensor()
    assert [list(value.shape) for value in values.values()] == [[3, 3], [4, 3], [3], [3], [3]]
    torch.testing.assert_close(values["blocks.0.fc.weight"], coefficients.raw[3:7])
    torch.testing.assert_close(coefficients.means()[1], coefficients.raw[3:7].mean(0))


@pytest.mark.parametrize("name", ["softmax", "simplex"])
def test_bounds_hold_for_every_column(name):
    coefficients = columns(bound=name)
    with torch.no_grad():
        coefficients.raw.copy_(torch.randn(10, 3))
    torch.testing.assert_close(coefficients().sum(1), torch.ones(10))


def test_columns_start_at_what_a_file_says(tmp_path):
    first = columns()
    with torch.no_grad():
        first.raw.copy_(torch.randn(10, 3))
    write_coefficients(first.table(), tmp_path / "columns.json")
    init = str(tmp_path / "columns.json")
    assert torch.equal(columns(init=init)(), first())
    torch.testing.assert_close(bound(init=init)(), first.means())  # by tensor: the mean of its columns
    write_coefficients(bound(init=[0.1, 0.2, 0.3]).table(), tmp_path / "tensors.json")
    assert columns(init=str(tmp_path / "tensors.json"))()[5].tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(InputError, match=r"columns\.json has 4 columns for blocks\.0\.fc\.weight, which has 7 here"):
        Coefficients("column", init=init).bind(ROWS, TASKS, shapes={**SHAPES, "blocks.0.fc.weight": (5, 7)})


def test_the_mean_is_a_start():
    torch.testing.assert_close(bound(init="mean")(), torch.full((5, 3), 1 / 3))
    Coefficients(init="mean").check(TASKS)


# -- some tensors alone learn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", ["model", "block", "tensor", "column"])
@pytest.mark.parametrize("name", ["none", "clamp", "softmax", "simplex", "tanh"])
def test_only_some_tensors_learn_and_the_others_stay(grain, name):
    coefficients = Coefficients(grain, name, only=r"fc\.weight").bind(ROWS, TASKS, shapes=SHAPES)
    start = {n: value.clone() for n, value in coefficients.by_tensor().items()}
    rows = {"model": 1, "block": 2, "tensor": 2, "column": 5}[grain]
    assert [list(p.shape) for p in coefficients.parameters()] == [[rows, 3]]
    steps = torch.optim.AdamW(coefficients.parameters(), lr=0.1, weight_decay=0.5)
    sum((value * torch.randn(value.shape)).sum() for value in coefficients.by_tensor().values()).backward()
    steps.step()
    for n, value in coefficients.by_tensor().items():
        assert value.requires_grad == ("fc.weight" in n)
        assert torch.equal(value, start[n]) == ("fc.weight" not in n)


def test_what_does_not_learn_begins_where_it_should():
    coefficients = bound(only="bias", init=torch.arange(15.0).view(5, 3))
    assert coefficients().tolist() == torch.arange(15.0).view(5, 3).tolist()
    assert coefficients.raw.tolist() == [[6, 7, 8]]
    assert coefficients.groups[1:3] == ("blocks.0.fc.weight (fixed)", "blocks.0.fc.bias")
    assert list(coefficients.state_dict()) == ["raw"]


def test_a_pattern_that_is_none_is_refused_before_work_starts():
    with pytest.raises(InputError, match=r"only='attn\(' is no regular expression"):
        Coefficients(only="attn(").check(TASKS)


@pytest.mark.parametrize(
    ("bound", "raw", "fraction"),
    [
        ("none", [[-5.0, 5.0]], 0.0),
        ("clamp", [[-5.0, 0.5], [1.0, 0.3]], 0.5),
        ("sigmoid", [[-9.0, 0.0]], 0.5),
        ("tanh", [[-9.0, 0.0]], 0.5),
        ("softmax", [[9.0, 0.0], [1.0, 0.0]], 0.5),
    ],
)
def test_saturation_is_the_share_of_values_at_a_bound(bound, raw, fraction):
    coefficients = Coefficients("tensor", bound).bind([str(n) for n in range(len(raw))], ["a", "b"])
    coefficients.raw.data.copy_(torch.tensor(raw))
    assert coefficients.saturated() == fraction


@pytest.mark.parametrize("name", ["none", "clamp", "softmax", "simplex", "sigmoid", "tanh"])
@pytest.mark.parametrize("only", [None, r"fc\.weight"])
def test_effective_values_are_taken_through_the_inverse_of_the_bound(name, only):
    coefficients = bound(bound=name, only=only)
    start, values = coefficients().detach(), torch.rand_like(coefficients.raw).softmax(1)
    coefficients.assign(values)
    torch.testing.assert_close(coefficients(), coefficients.whole(values))
    learns = [only is None or "fc.weight" in row for row in ROWS]
    torch.testing.assert_close(coefficients()[learns], values)
    assert torch.equal(coefficients()[[not it for it in learns]], start[[not it for it in learns]])


def test_values_out_of_bounds_are_not_taken():
    with pytest.raises(InputError, match=r"1\.5 is not possible under bound 'clamp'"):
        bound(bound="clamp").assign(torch.full((5, 3), 1.5))
