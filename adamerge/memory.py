"""Memory that a process keeps for its next step instead of handing it back to the system."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: Of `malloc.h`: when freed memory goes back, from which size on allocations come straight from the system, how many,
#: and how many heaps threads have of their own, none of which holds a large tensor.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
#: Where the library's own thresholds end up in a process that uses large tensors: they no longer move once one is set.
_USUAL = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _MMAP_MAX: 2**16, _ARENA_MAX: 0}


@contextmanager
def kept() -> Iterator[None]:
    """Within the block, freed memory stays with the process (the GNU C library; elsewhere nothing happens).

    By default every tensor above 32 MB comes fresh from the system and goes back at once, so that a step touches
    gigabytes of new pages, each of which the system has to find and clear: on a CPU that can cost more than the
    arithmetic of a merge. The price of keeping is what fragments of freed memory add to the peak. The environment's
    ADAMERGE_KEEP=0 turns this off, and where it sets one of the library's own `MALLOC_...` variables, these hold.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    asked = os.environ.get("ADAMERGE_KEEP", "1") != "0" and not any(name.startswith("MALLOC_") for name in os.environ)
    if library is None or not hasattr(library, "mallopt") or not asked:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_ARENA_MAX, 1)
    library.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            library.mallopt(option, value)
        library.malloc_trim(0)
