"""Spherical means: angles and lengths worked out by hand, and what happens where there is no arc."""

import math

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Karcher, MultiSlerp, NuSlerp, Slerp
from adamerge.rules.sphere import karcher, multislerp, nuslerp, slerp


def at(degrees: float, length: float = 1.0) -> torch.Tensor:
    angle = math.radians(degrees)
    return length * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)


def vectors(base: list[float], *experts: list[float]) -> TaskVectors:
    states = [{"w": torch.tensor(values, dtype=torch.float64)} for values in (base, *experts)]
    return TaskVectors.from_state_dicts(states[0], dict(zip("abc", states[1:], strict=False)))


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.degrees(math.acos(float(a @ b / a.norm() / b.norm())))


# -- two vectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [slerp, nuslerp])
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_unit_vectors_turn_at_constant_speed(function, t):
    assert_close(function(at(10), at(100), t), at(10 + 90 * t), rtol=0, atol=1e-15)
    assert_close(function(at(170), at(-160), t), at(170 + 30 * t), rtol=0, atol=1e-14)


@pytest.mark.parametrize("function", [slerp, nuslerp])
def test_lengths_count_for_nothing_but_the_angle(function):
    # Both are mixed as they are: at a right angle, each with cos 45°.
    mixed = function(torch.tensor([4.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    assert_close(mixed, torch.tensor([4.0, 2.0]) * math.sqrt(0.5))


def test_a_matrix_is_one_vector():
    a, b = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    omega = math.acos(sum(x * y for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
                      / math.hypot(*a.flatten().tolist()) / math.hypot(*b.flatten().tolist()))  # fmt: skip
    expected = (math.sin(0.7 * omega) * a + math.sin(0.3 * omega) * b) / math.sin(omega)
    assert_close(slerp(a, b, 0.3), expected, rtol=0, atol=1e-14)
    assert_close(nuslerp(a, b, 0.3), expected, rtol=0, atol=1e-14)


def test_above_a_cosine_of_9995_slerp_is_on_a_line():
    below, above = math.degrees(math.acos(0.99949)), math.degrees(math.acos(0.99951))
    assert_close(slerp(at(0), at(below), 0.5).norm(), torch.tensor(1.0).double(), rtol=0, atol=1e-15)
    for degrees in (above, 180 - above):
        assert torch.equal(slerp(at(0), at(degrees), 0.25), torch.lerp(at(0), at(degrees), 0.25))
    assert_close(nuslerp(at(0), at(above), 0.5), at(above / 2), rtol=0, atol=1e-15)


@pytest.mark.parametrize("function", [slerp, nuslerp])
@pytest.mark.parametrize(
    ("a", "b"), [([0.0, 0], [2.0, 4]), ([1.0, 2], [-1.0, -2]), ([1.0, 2], [2.0, 4]), ([3.0], [-1.0])]
)
def test_without_an_arc_there_is_a_line(function, a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    assert_close(function(a, b, 0.25), 0.75 * a + 0.25 * b)


def test_nearly_opposite_vectors_stay_bounded():
    # In float32 the cosine is exactly -1 here, and dividing by its sine would give thousands.
    a = torch.randn(2000)
    for size in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        b = -a + size * torch.randn(2000)
        assert nuslerp(a, b, 0.5).norm() <= 1.01 * a.norm()


def test_rows_and_columns_turn_apart():
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    rows, columns = nuslerp(a, b, 0.3, "row"), nuslerp(a, b, 0.3, "column")
    for i in range(3):
        assert_close(rows[i], slerp(a[i], b[i], 0.3), rtol=0, atol=1e-14)
    for j in range(5):
        assert_close(columns[:, j], slerp(a[:, j], b[:, j], 0.3), rtol=0, atol=1e-14)
    filters = nuslerp(a.view(3, 1, 5), b.view(3, 1, 5), 0.3, "row")
    assert torch.equal(filters, rows.view(3, 1, 5))
    assert torch.equal(nuslerp(a[0], b[0], 0.3, "column"), nuslerp(a[0], b[0], 0.3))


def test_slerp_goes_from_the_first_expert_to_the_second_whatever_the_base():
    tv = vectors([5.0, 5.0], [2.0, 0.0], [0.0, 2.0])
    assert_close(merge(tv, [Slerp(1 / 3)])["w"], at(30, 2), rtol=0, atol=1e-14)
    assert_close(merge(tv, [Slerp(1 / 3)], scale=0.5)["w"], (at(30, 2) + 5) / 2, rtol=0, atol=1e-14)


def test_one_of_the_two_may_be_the_base():
    with pytest.warns(UserWarning, match="expert 'a' is identical to the base"):
        tv = vectors([2.0, 0.0], [2.0, 0.0], [0.0, 2.0])
    assert_close(merge(tv, [Slerp(1 / 3)])["w"], at(30, 2), rtol=0, atol=1e-14)


def test_nuslerp_takes_weights_and_an_origin():
    tv = vectors([5.0, 5.0], [7.0, 5.0], [5.0, 7.0])
    expected = 5 + at(30, 2)
    for weights in ([2.0, 1.0], {"b": 0.1, "a": 0.2}):
        assert_close(merge(tv, [NuSlerp(weights, on="task_vectors")])["w"], expected, rtol=0, atol=1e-14)
    tv = vectors([0.0, 0.0], [2.0, 0.0], [0.0, 2.0])
    assert_close(merge(tv, [NuSlerp([2.0, 1.0])])["w"], at(30, 2), rtol=0, atol=1e-14)


# -- any number --------------------------------------------------------------------------------------------------------


def test_multislerp_is_the_mean_direction_at_the_mean_length():
    tensors = torch.stack([at(0, 3.0), at(90, 1.0)])
    assert_close(multislerp(tensors, [0.5, 0.5]), at(45, 2.0), rtol=0, atol=1e-14)
    # Directions weighted 3 : 4, lengths 0.3 · 3 + 0.4 · 1.
    assert_close(
        multislerp(tensors, [0.3, 0.4]), 1.3 * torch.tensor([0.6, 0.8], dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_a_step_along_the_mean_tangent_changes_nothing():
    tensors, weights = torch.randn(4, 6, dtype=torch.float64), [0.4, 0.1, 0.3, 0.2]
    units = [tensor / tensor.norm() for tensor in tensors]
    mean = sum(weight * unit for weight, unit in zip(weights, units, strict=True))
    mean = mean / mean.norm()
    tangent = sum(weight * (unit - (unit @ mean) * mean) for weight, unit in zip(weights, units, strict=True))
    step = tangent.norm() + 1e-8
    moved = mean * torch.cos(step) + tangent * torch.sin(step) / step
    length = sum(weight * tensor.norm() for weight, tensor in zip(weights, tensors, strict=True))
    assert_close(multislerp(tensors, weights), moved * length, rtol=1e-14, atol=1e-14)


def test_the_karcher_mean_has_no_pull():
    tensors = torch.randn(4, 6, dtype=torch.float64)
    mean = karcher(tensors, max_iter=200, tol=1e-12)
    assert_close(mean.norm(), tensors.flatten(1).norm(dim=1).mean(), rtol=1e-13, atol=0)
    mean, pull = mean / mean.norm(), torch.zeros(6, dtype=torch.float64)
    for tensor in tensors:
        unit = tensor / tensor.norm()
        theta = math.acos(float(unit @ mean))
        pull += theta / math.sin(theta) * (unit - math.cos(theta) * mean)
    assert pull.norm() < 1e-11
    start = karcher(tensors, max_iter=0)
    assert_close(start, multislerp(tensors, [0.25] * 4), rtol=1e-14, atol=0)
    assert angle(start, mean) > 1


def test_on_a_circle_the_karcher_mean_is_the_mean_angle():
    tensors = torch.stack([at(0), at(10, 2.0), at(80, 6.0)])
    assert_close(karcher(tensors), at(30, 3.0), rtol=0, atol=1e-6)
    assert angle(multislerp(tensors, [1 / 3] * 3), at(30)) > 1


def test_short_tensors_have_no_say_in_the_karcher_direction():
    tensors = torch.stack([at(0, 3.0), at(90, 1e-6)])
    assert_close(karcher(tensors), at(0, 1.5), rtol=0, atol=1e-6)
    assert_close(karcher(tensors / 1e6), at(45, 1.5e-6), rtol=0, atol=1e-12)


def test_zeros_take_part_in_the_length_alone():
    tensors = torch.stack([at(20, 3.0), at(0, 0.0)])
    for mean in (multislerp(tensors, [0.5, 0.5]), karcher(tensors)):
        assert_close(mean, at(20, 1.5), rtol=0, atol=1e-15)


@pytest.mark.parametrize("rule", [MultiSlerp(), Karcher()], ids=lambda rule: type(rule).__name__)
def test_directions_that_cancel_out_are_named(rule):
    with pytest.raises(InputError, match=r"w: the experts' directions cancel out.*Linear"):
        merge(vectors([5.0, 5.0], [1.0, 2.0], [-2.0, -4.0]), [rule])


def test_other_weights_do_not_cancel_out():
    merged = merge(vectors([5.0, 5.0], [3.0, 4.0], [-6.0, -8.0]), [MultiSlerp([3.0, 1.0])])["w"]
    assert_close(merged, 6.25 * torch.tensor([0.6, 0.8], dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", [Slerp(), NuSlerp(), MultiSlerp(), Karcher()], ids=lambda rule: type(rule).__name__)
def test_a_single_number_is_averaged(rule):
    assert merge(vectors([0.0], [3.0], [-1.0]), [rule])["w"].tolist() == [1.0]


@pytest.mark.parametrize("rule", [NuSlerp, MultiSlerp, Karcher])
def test_about_the_base(rule):
    base = torch.tensor([3.0, -1.0]).double()
    tv = vectors(base.tolist(), (base + at(0, 2)).tolist(), (base + at(90, 2)).tolist())
    about_zero = vectors([0.0, 0.0], at(0, 2).tolist(), at(90, 2).tolist())
    assert_close(merge(tv, [rule(on="task_vectors")])["w"], base + at(45, 2), rtol=0, atol=1e-14)
    assert_close(merge(about_zero, [rule()])["w"], at(45, 2), rtol=0, atol=1e-14)
    assert not torch.allclose(merge(tv, [rule()])["w"], base + at(45, 2))


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slerp(1.5), "expected 0 <= t <= 1 in Slerp, got 1.5"),
        (lambda: NuSlerp(per="rows"), "expected per to be 'tensor', 'row' or 'column' in NuSlerp, got 'rows'"),
        (lambda: MultiSlerp(on="base"), "expected on to be 'weights' or 'task_vectors' in MultiSlerp, got 'base'"),
        (lambda: Karcher(tol=0.0), "expected max_iter >= 0 and tol > 0 in Karcher, got 10 and 0.0"),
        (lambda: merge(vectors([0.0], [1.0]), [NuSlerp()]), "NuSlerp takes 2 experts, got 1: a"),
        (lambda: merge(vectors([0.0], [1.0], [2.0]), [NuSlerp([1.0, -1.0])]), r"weights of NuSlerp.* sum to 0"),
        (lambda: merge(vectors([0.0], [1.0]), [MultiSlerp([1.0, 2.0])]), "MultiSlerp has 2 weights for 1 experts: a"),
        (lambda: merge(vectors([0.0], [1.0]), [MultiSlerp({"x": 1.0})]), r"has weights for \['x'\], the experts are"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
