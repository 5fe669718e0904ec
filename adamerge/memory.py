"""Memory that a process keeps for its next step instead of handing it back to the system."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Of `malloc.h`: when freed memory goes back, and how many allocations come straight from the system.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_USUAL = {_TRIM_THRESHOLD: 2**17, _MMAP_MAX: 2**16}


@contextmanager
def kept() -> Iterator[None]:
    """Within the block, freed memory stays with the process (the GNU C library; elsewhere nothing happens).

    By default every tensor above 32 MB comes fresh from the system and goes back at once, so that a step touches
    gigabytes of new pages, each of which the system has to find and clear: on a CPU that can cost more than the
    arithmetic of a merge. The price of keeping is what fragments of freed memory add to the peak. Where the environment
    sets one of the library's own `MALLOC_...` variables, these hold.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            library.mallopt(option, value)
        library.malloc_trim(0)
