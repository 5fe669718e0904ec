"""Decoding image files, and finding those that cannot be decoded before a run comes across them."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge.data.preprocess import to_rgb
from adamerge.errors import InputError
from adamerge.files import cache_folder, write_text

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

#: Pillow would also try formats that start other programs, whatever a file is called.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: Size in bytes and time of the last change in ns: while both stay, a file that could be decoded still can.
State = list[int]
_QUIET = 2000


def decode(path: Path) -> "Image":
    """An image file in RGB. Raises InputError naming the file and the reason."""
    try:
        return _load(path)
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise InputError(f"{path} cannot be decoded: {reason(error)}") from error


def undecodable(root: Path, files: Sequence[Path]) -> dict[Path, str]:
    """Decode files below `root` in threads; return those that fail, with the reason, in the given order.

    Good files are remembered by name, size and time of change in the user's cache folder and not decoded again.
    """
    memory = cache_folder() / "images" / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
    known = _recall(memory)
    names = {path: path.relative_to(root).as_posix() for path in files}
    states = {path: _state(path) for path in files}
    good = {names[path]: state for path, state in states.items() if state and known.get(names[path]) == state}
    new = [path for path in files if names[path] not in good]
    bad: dict[Path, str] = {}
    try:
        for path, why in zip(new, _reasons(new, root), strict=True):
            if why is not None:
                bad[path] = why
            elif (state := states[path]) is not None:
                good[names[path]] = state
    finally:  # so that an interrupted check goes on where it was
        if len(new) > len(bad):
            _remember(memory, good)
    return bad


def _reasons(files: Sequence[Path], root: Path) -> Iterable[str | None]:
    """Why each file cannot be decoded, `None` for those that can."""
    from tqdm import tqdm

    few = len(files) < _QUIET
    with ThreadPoolExecutor() as pool:
        yield from tqdm(pool.map(_why, files), f"Checking images of {root}", len(files), leave=False, disable=few)


def _why(path: Path) -> str | None:
    try:
        _load(path)
    except Exception as error:  # as in decode
        return reason(error)
    return None


def _load(path: Path) -> "Image":
    from PIL import Image

    Image.init()
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        return to_rgb(image)


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _state(path: Path) -> State | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _recall(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or spoilt: then everything is decoded again
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, good: dict[str, State]) -> None:
    try:
        write_text(memory, json.dumps(good))
    except OSError as error:
        log.info("cannot remember which images were checked: %s", error)
