"""Independently trained networks lie in one basin once their units are in one order."""

import pytest

from benchmarks.barrier import MARKS, barrier, curves, main


def test_matching_takes_the_barrier_away():
    lines = curves(seed=0, width=96, epochs=15)
    found = {name: barrier(each["loss"]) for name, each in lines.items() if name not in MARKS}
    assert found["as they are"] > 0.1
    assert found["matched by weights"] < 0.3 * found["as they are"]
    assert found["matched by activations"] < 0.3 * found["as they are"]
    middle = lines["as they are"]["accuracy"][12]
    for name in MARKS:
        assert sum(lines[name]["accuracy"]) / len(lines[name]["accuracy"]) > middle + 2, name


def test_the_barrier_is_the_rise_above_the_straight_line():
    assert barrier([1 - step / 24 for step in range(25)]) < 1e-12
    assert abs(barrier([1.0] + [2.0] * 23 + [1.0]) - 1) < 1e-12


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_the_benchmark_leaves_numbers_and_a_figure(tmp_path, network):
    main(["--output", str(tmp_path), "--network", network, "--width", "8", "--epochs", "1", "--pairs", "1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["barrier.json", "barrier.png"]
