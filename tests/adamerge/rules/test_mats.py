"""MaTS against the linear system written out."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.observing import Observation
from adamerge.rules import MaTs, Mean, RegMean
from adamerge.rules.mats import conjugate_gradient
from adamerge.statistics import Statistics

ROWS, COLUMNS = 2, 3


@pytest.fixture
def vectors() -> TaskVectors:
    torch.manual_seed(0)
    states = [{"w": torch.randn(ROWS, COLUMNS).double(), "b": torch.randn(ROWS).double()} for _ in range(3)]
    return TaskVectors.from_state_dicts(states[0], {"x": states[1], "y": states[2]})


@pytest.fixture
def statistics() -> Statistics:
    torch.manual_seed(1)
    return Statistics({task: Observation({"gram/w": gram(COLUMNS), "output_gram/w": gram(ROWS)}) for task in "xy"})


def gram(size: int) -> torch.Tensor:
    x = torch.randn(2 * size, size, dtype=torch.float64)
    return x.T @ x


def test_it_solves_the_system(vectors, statistics):
    merged = merge(vectors, [MaTs(statistics, rho=1.0, tolerance=1e-13)])
    left, right = torch.zeros(6, 6).double(), torch.zeros(6).double()
    for task in "xy":
        fisher = torch.kron(statistics.find("output_gram", task, "w"), statistics.find("gram", task, "w"))
        left += fisher
        right += fisher @ vectors.expert(task)["w"].flatten()
    assert_close(merged["w"].flatten(), torch.linalg.solve(left, right))
    assert_close(merged["b"], merge(vectors, [Mean()])["b"])


def test_gradients_that_are_alike_in_all_directions_leave_regmean(vectors, statistics):
    plain = {
        task: Observation({**each.tensors, "output_gram/w": torch.eye(ROWS).double()})
        for task, each in statistics.observations.items()
    }
    merged = merge(vectors, [MaTs(Statistics(plain), rho=0.7, tolerance=1e-12)])
    assert_close(merged["w"], merge(vectors, [RegMean(Statistics(plain), rho=0.7, ridge=1e-13)])["w"])


def test_without_steps_it_is_its_start(vectors, statistics):
    mean = merge(vectors, [Mean()])["w"]
    assert_close(merge(vectors, [MaTs(statistics, iterations=0)])["w"], mean)
    expected = vectors.base["w"] + 0.3 * vectors.deltas["w"].sum(0)
    assert_close(merge(vectors, [MaTs(statistics, iterations=0, start=0.3)])["w"], expected)


def test_transposed_weights(vectors, statistics):
    turned = {t: Observation(o.tensors, transposed=frozenset("w")) for t, o in statistics.observations.items()}
    states = [{"w": s["w"].T, "b": s["b"]} for s in (vectors.base, vectors.expert("x"), vectors.expert("y"))]
    merged = merge(
        TaskVectors.from_state_dicts(states[0], dict(zip("xy", states[1:], strict=True))), [MaTs(Statistics(turned))]
    )
    assert_close(merged["w"].T, merge(vectors, [MaTs(statistics)])["w"])


def test_conjugate_gradients_end_after_as_many_steps_as_there_are_directions():
    torch.manual_seed(0)
    matrix, target = gram(4), torch.randn(4, dtype=torch.float64)
    found = conjugate_gradient(lambda x: matrix @ x, target, torch.zeros(4).double(), 4, 0.0)
    assert_close(found, torch.linalg.solve(matrix, target))
    loose = conjugate_gradient(lambda x: matrix @ x, target, torch.zeros(4).double(), 4, 0.5)
    assert 0 < torch.linalg.vector_norm(target - matrix @ loose) <= 0.5 * torch.linalg.vector_norm(target)


def test_directions_that_do_not_count_stay_where_they_start():
    start = torch.tensor([5.0, 7.0])
    found = conjugate_gradient(lambda x: x * torch.tensor([2.0, 0.0]), torch.tensor([2.0, 0.0]), start, 10, 0.0)
    assert_close(found, torch.tensor([1.0, 7.0]))


def test_what_is_missing_is_said(vectors, statistics):
    grams = Statistics({task: Observation({"gram/w": gram(COLUMNS)}) for task in "xy"})
    with pytest.raises(InputError, match="MaTs needs the output_gram of 'x'"):
        merge(vectors, [MaTs(grams)])
    with pytest.raises(InputError, match="iterations >= 0"):
        MaTs(statistics, iterations=-1)
