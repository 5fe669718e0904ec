"""Files that are whole or not there: written under a temporary name, then renamed."""

import errno
import glob
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adamerge.errors import InputError, did_you_mean

#: Seconds after which a temporary file that nobody has written to is one that a killed writer left.
STALE = 3600


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the final name when the block ends without an error.

    Raises:
        InputError: when the disk is full; what was there under the final name before is there still.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with room_for(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what writers of this file left that were killed: temporary files that nobody writes to any more."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # another process may be as quick
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Within the block, a disk or quota that is full is an InputError, which says for what there was no room."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise InputError(
            f"no space left for {path} ({_free(path)}): make room, and the same command goes on"
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: torch raises another one over it, safetensors has it in words."""
    if error is None or isinstance(error, InputError):
        return False
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (said := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(said[1])
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or _is_full(error.__context__)


def _free(path: Path) -> str:
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free in {folder}"


def flush(path: Path) -> None:
    """See to it that a file, or a folder's list of names, is on the disk itself: what a power cut leaves."""
    if sys.platform == "win32" and path.is_dir():
        return
    opened = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():  # not every file system can do this to a folder
            raise
    finally:
        os.close(opened)


def write_text(path: Path, text: str) -> None:
    """Write a text file under its final name only once it is complete."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is free again when the process ends, however it ends.

    Raises:
        BlockingIOError: where another process holds it. A system without such locks gives none, and no error.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # not every network file system has them
            pass
        yield


def json_file(path: Path) -> Any:
    """What a JSON file says, or None where there is none that is whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def cache_folder() -> Path:
    """Where things made once are kept: `ADAMERGE_CACHE`, else `adamerge` in the user's cache folder; may not exist."""
    if own := os.environ.get("ADAMERGE_CACHE"):
        return expanded(own)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "adamerge"


def expanded(path: str | Path) -> Path:
    """A path with the home folder in the place of `~` or `~user`; raises InputError for a user that there is not."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no home folder for {Path(path).parts[0]}: write the path out") from error


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; a name that no file can have, too long for one, is that of none."""
    try:
        return path.exists()
    except OSError:
        return False


def nearest(path: str | Path) -> str:
    """The end of a sentence about a YAML file that is not there: which one in its folder may be meant, if any."""
    folder, name = os.path.split(path)
    beside = glob.glob(os.path.join(glob.escape(folder), "*.y*ml"))
    return did_you_mean(os.path.splitext(name)[0], sorted(map(os.path.basename, beside)), "")
