import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.observing import Observation
from adamerge.rules import Fisher, Mean
from adamerge.statistics import Statistics

BASE = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.5])}
EXPERTS = {
    "a": {"w": torch.tensor([3.0, 2.0]), "b": torch.tensor([1.5])},
    "b": {"w": torch.tensor([0.0, 6.0]), "b": torch.tensor([0.0])},
}


def vectors() -> TaskVectors:
    return TaskVectors.from_state_dicts(
        *[
            {n: v.double() for n, v in BASE.items()},
            {t: {n: v.double() for n, v in e.items()} for t, e in EXPERTS.items()},
        ]
    )


def of(**fishers: dict[str, list[float]]) -> Statistics:
    return Statistics(
        {t: Observation({f"fisher/{n}": torch.tensor(v).double() for n, v in f.items()}) for t, f in fishers.items()}
    )


def test_every_entry_is_a_weighted_mean():
    statistics = of(a={"w": [3.0, 0.0], "b": [4.0]}, b={"w": [1.0, 2.0], "b": [2.0]})
    merged = merge(vectors(), [Fisher(statistics, normalize=False, floor=1e-14)])
    assert_close(merged["w"].tolist(), [(3 * 3 + 1 * 0) / 4, (0 * 2 + 2 * 6) / 2])
    assert_close(merged["b"].tolist(), [(4 * 1.5 + 2 * 0) / 6])
    merged = merge(vectors(), [Fisher(statistics, floor=1e-14)])  # the norms are 5 and 3
    assert_close(merged["w"].tolist(), [(3 / 5 * 3) / (3 / 5 + 1 / 3), 6.0])
    assert_close(merged["b"].tolist(), [(4 / 5 * 1.5) / (4 / 5 + 2 / 3)])


def test_equal_information_is_the_mean():
    same = {"w": [0.3, 20.0], "b": [1.0]}
    merged, mean = merge(vectors(), [Fisher(of(a=same, b=same))]), merge(vectors(), [Mean()])
    for name in BASE:
        assert_close(merged[name], mean[name])


def test_where_nobody_knows_the_mean_is_taken():
    merged = merge(vectors(), [Fisher(of(a={"w": [0.0, 1.0]}, b={"w": [0.0, 1.0]}))])
    assert_close(merged["w"][0], torch.tensor(1.5).double())
    assert_close(merged["b"], torch.tensor([0.75]).double())


def test_the_scale_of_the_information_does_not_matter():
    one = of(a={"w": [3.0, 0.0], "b": [4.0]}, b={"w": [1.0, 2.0], "b": [2.0]})
    tiny = of(a={"w": [3e-9, 0.0], "b": [4e-9]}, b={"w": [1e-9, 2e-9], "b": [2e-9]})
    for normalize in (True, False):
        assert_close(merge(vectors(), [Fisher(tiny, normalize)]), merge(vectors(), [Fisher(one, normalize)]))


def test_information_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"w: the fisher of 'a' has shape \[3\], expected \[2\]"):
        merge(vectors(), [Fisher(of(a={"w": [1.0, 1.0, 1.0]}, b={"w": [1.0, 1.0]}))])
    with pytest.raises(InputError, match="floor > 0"):
        Fisher("somewhere", floor=0.0)
