"""Work done ahead of whoever waits for it: reading and arithmetic leave the interpreter lock, so threads help."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")

#: More threads than this wait for the disk or for memory.
WORKERS = min(8, os.cpu_count() or 1)


def in_order(work: Callable[[A], B], items: Iterable[A], workers: int = WORKERS) -> Iterator[B]:
    """`work` on each item, in their order, with at most twice `workers` outcomes made before they are asked for."""
    pool = ThreadPoolExecutor(workers)
    made: deque[Future[B]] = deque()
    try:
        for item in items:
            made.append(pool.submit(work, item))
            if len(made) > 2 * workers:  # so that none waits for whoever takes the outcomes
                yield made.popleft().result()
        while made:
            yield made.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, torch shares no operation out: sums are in an order that no number of cores changes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
