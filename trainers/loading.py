"""Items from worker processes, which may die."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

from adamerge import InputError

log = logging.getLogger(__name__)

#: How often in a row workers may die before a run stops.
TRIES = 3


class Told(Dataset[Any]):
    """Items of a data set, or what is wrong with them: torch would bury an error of a worker under its traceback."""

    def __init__(self, items: Dataset[Any]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> Any:
        try:
            return self.items[index]
        except InputError as error:
            return error


def load(items: Dataset[Any], steps: range, num_workers: int) -> Iterator[Any]:
    """The items of these steps, in order.

    Where a worker dies, others begin with the item that it owed: an item depends on nothing but its step.

    Raises:
        InputError: for what is wrong with an item, and where workers die again and again.
    """
    died, step = 0, steps.start
    while step < steps.stop:
        loader = DataLoader(Told(items), batch_size=None, sampler=range(step, steps.stop), num_workers=num_workers)
        try:
            with _no_interruption():
                loaded = iter(loader)
            for item in loaded:
                if isinstance(item, InputError):
                    raise item
                yield item
                step, died = step + 1, 0
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            died += 1
            if died > TRIES:
                raise InputError(
                    f"worker processes that load images died {died} times in a row, at batch {step} ({_line(error)}): "
                    "is there too little memory? Give data fewer num_workers, or 0 for none"
                ) from error
            log.warning("A worker process that loads images died (%s): begun again at batch %d", _line(error), step)


@contextmanager
def _no_interruption() -> Iterator[None]:
    """No error in mid-step: torch's handler of SIGCHLD raises it, but who waits for a worker sees it too."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(". ")
