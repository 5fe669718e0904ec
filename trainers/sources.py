"""Where images to predict come from, one by one and without an end: folders that grow, file names on standard input."""

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from adamerge import InputError
from adamerge.data.decoding import decode
from adamerge.data.folders import SUFFIXES
from adamerge.files import expanded

log = logging.getLogger(__name__)

#: A name and an image: a PIL image or a uint8 array [H, W, 3] or [H, W].
Item = tuple[str, Any]


class Source(ABC, Iterable[Item]):
    """Names and images, as they come. Any iterable of such pairs will do where a source is asked for in Python."""

    @abstractmethod
    def __iter__(self) -> Iterator[Item]:
        """Name and image, one by one; waits where the next one is still to come."""


class Files(Source):
    """Image files, which may be broken.

    Args:
        on_bad_image: "stop" raises InputError for a file that cannot be decoded, "skip" leaves it out and counts.
    """

    def __init__(self, on_bad_image: Literal["stop", "skip"] = "stop") -> None:
        self.on_bad_image, self.unread = on_bad_image, 0

    def read(self, path: Path) -> Iterator[Item]:
        """One file, if it can be read."""
        try:
            image = decode(path)
        except InputError as error:
            if self.on_bad_image == "stop":
                raise
            self.unread += 1
            log.warning("%s: it is left out (%d so far)", error, self.unread)
        else:
            yield str(path), image


class Folder(Files):
    """The image files in a folder and below, by name; with `watch`, new ones as they come.

    A file counts as come when its size has not changed between two looks.

    Args:
        path: the folder.
        watch: seconds between two looks; default: only what is there now.
        patience: looks without anything new after which a watched folder counts as complete; default: none.
        on_bad_image: see `Files`.
    """

    def __init__(
        self,
        path: str,
        watch: float | None = None,
        patience: int | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__(on_bad_image)
        if watch is not None and watch <= 0:
            raise InputError(f"watch is the seconds between two looks, not {watch}")
        self.path, self.watch, self.patience = expanded(path), watch, patience

    def __iter__(self) -> Iterator[Item]:
        if not self.path.is_dir():
            raise InputError(f"no such folder: {self.path}")
        done, sizes, idle = set[Path](), dict[Path, int](), 0
        while True:
            found = self._files()
            ready = [path for path, size in found.items() if path not in done and sizes.get(path) in (size, None)]
            ready = [path for path in ready if self.watch is None or path in sizes]
            sizes, idle = found, 0 if ready or found != sizes else idle + 1
            for path in ready:
                done.add(path)
                yield from self.read(path)
            if self.watch is None or (self.patience is not None and idle >= self.patience):
                return
            time.sleep(self.watch)

    def _files(self) -> dict[Path, int]:
        """Image files and their sizes, by name; what is hidden, as a file that is still written may be, is left out."""
        below = (path for path in sorted(self.path.rglob("*")) if path.suffix.lower() in SUFFIXES)
        seen = [p for p in below if not any(part.startswith(".") for part in p.relative_to(self.path).parts)]
        return {path: path.stat().st_size for path in seen if path.is_file()}


class StandardInput(Files):
    """The image files that standard input names, one a line."""

    def __iter__(self) -> Iterator[Item]:
        for line in sys.stdin:
            if name := line.strip():
                yield from self.read(Path(name))
