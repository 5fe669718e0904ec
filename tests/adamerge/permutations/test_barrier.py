"""Independently trained networks lie in one basin once their units are in one order."""

from benchmarks.barrier import barrier, curves, main


def test_matching_takes_the_barrier_away():
    found = {name: barrier(lines["loss"]) for name, lines in curves(seed=0, width=96, epochs=15).items()}
    assert found["as they are"] > 0.1
    assert found["matched by weights"] < 0.3 * found["as they are"]
    assert found["matched by activations"] < 0.3 * found["as they are"]


def test_the_barrier_is_the_rise_above_the_straight_line():
    assert barrier([1 - step / 24 for step in range(25)]) < 1e-12
    assert abs(barrier([1.0] + [2.0] * 23 + [1.0]) - 1) < 1e-12


def test_the_benchmark_leaves_numbers_and_a_figure(tmp_path):
    main(["--output", str(tmp_path), "--width", "8", "--epochs", "1", "--pairs", "1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["barrier.json", "barrier.png"]
