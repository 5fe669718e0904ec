"""Downloads that a slow or busy server fails are tried again."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds until a download is tried again, after each try but the last.
WAITS = (1, 5, 20)
#: What a server answers that is busy for now.
_BUSY = (429, 500, 502, 503, 504)


def persistently(fetch: Callable[[], T], name: str) -> T:
    """What `fetch()` gives; where it times out, or the server is busy, it is tried again `len(WAITS)` times.

    Whatever goes wrong otherwise, or in the last try, is raised as it is.
    """
    for wait in WAITS:
        try:
            return fetch()
        except Exception as error:
            if not _passes(error):
                raise
            log.warning("%s: %s while fetching it; tried again in %d s", name, type(error).__name__, wait)
            time.sleep(wait)
    return fetch()


def _passes(error: BaseException | None) -> bool:
    """Whether a time-out, a lost connection or a busy server is behind an error, whichever library it comes from."""
    if error is None:
        return False
    timed_out = isinstance(error, TimeoutError | ConnectionResetError) or "Timeout" in type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    return timed_out or status in _BUSY or _passes(error.__cause__ or error.__context__)
