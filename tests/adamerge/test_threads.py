"""Work ahead: in order, no further ahead than said, and errors where they are asked for."""

import threading
import time

import pytest

from adamerge.threads import in_order


def test_outcomes_come_in_the_order_of_the_items():
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3 == 0))
        return item * item

    assert list(in_order(work, range(40), workers=4)) == [item * item for item in range(40)]


def test_only_a_few_outcomes_wait():
    taken = 0

    def items():
        nonlocal taken
        for item in range(100):
            taken += 1
            yield item

    outcomes = in_order(lambda item: item, items(), workers=3)
    for asked in range(1, 50):
        next(outcomes)
        assert taken <= asked + 6
    outcomes.close()
    assert taken < 60


def test_an_error_comes_in_its_turn_and_ends_the_threads():
    def work(item: int) -> int:
        if item == 5:
            raise ValueError("five")
        return item

    seen, before = [], threading.active_count()
    with pytest.raises(ValueError, match="five"):
        seen.extend(in_order(work, range(100), workers=2))
    assert seen == [0, 1, 2, 3, 4]
    assert threading.active_count() == before
