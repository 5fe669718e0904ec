"""Folders of image files, one subfolder per class."""

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from adamerge.data.base import SPLITS, DataSource, Images, Split, class_difference
from adamerge.data.decoding import decode, undecodable
from adamerge.data.preprocess import Preprocess
from adamerge.errors import InputError
from adamerge.files import expanded

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
_SHOWN = 3


class FileImages(Images):
    """Image files, decoded when they are asked for."""

    def __init__(self, files: Sequence[Path], labels: Tensor, preprocess: Preprocess) -> None:
        super().__init__(labels, preprocess)
        self.files = files

    def image(self, index: int) -> "Image":
        return decode(self.files[index])

    def where(self, index: int) -> str:
        return str(self.files[index])


class ImageFolders(DataSource):
    """One folder per split with one subfolder per class, sorted by name; images lie anywhere below.

    `check` decodes every image once; good files are remembered, so that only new and changed ones are decoded again.
    Files and folders whose name begins with a dot are ignored.

    Args:
        train: the folder to train on, if there is one.
        test: the folder to adapt and to score on, if there is one; it has the classes of `train`.
        on_bad_image: "stop" raises InputError for images that cannot be decoded, "skip" leaves them out with a warning.
    """

    def __init__(
        self,
        train: str | Path | None = None,
        test: str | Path | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
    ) -> None:
        if train is None and test is None:
            raise InputError("ImageFolders needs a folder: give train, test or both")
        if on_bad_image not in ("stop", "skip"):
            raise InputError(f"on_bad_image is 'stop' or 'skip', got {on_bad_image!r}")
        given: dict[Split, str | Path | None] = {"train": train, "test": test}
        self.folders = {split: expanded(folder) for split, folder in given.items() if folder is not None}
        self.on_bad_image = on_bad_image

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in SPLITS if split in self.folders)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        names = {split: _class_names(folder) for split, folder in self.folders.items()}
        if len(names) == 2 and names["train"] != names["test"]:
            difference = class_difference(names["train"], names["test"])
            raise InputError(f"{self.folders['test']} has not the classes of {self.folders['train']}: {difference}")
        return names[self.splits[0]]

    @property
    def skipped(self) -> int:
        """How many images are left out because they cannot be decoded."""
        return sum(len(bad) for bad in self._bad.values()) if self.on_bad_image == "skip" else 0

    def dataset(self, split: Split, preprocess: Preprocess) -> FileImages:
        if split not in self.folders:
            raise InputError(f"no {split} folder was given; there is {self.splits[0]}={self.folders[self.splits[0]]}")
        files = self._files[split]
        if self.on_bad_image == "skip":
            files = [(path, label) for path, label in files if path not in self._bad[split]]
        labels = torch.tensor([label for _, label in files], dtype=torch.int64)
        return FileImages([path for path, _ in files], labels, preprocess)

    def check(self) -> None:
        bad = {path: why for split in self.splits for path, why in self._bad[split].items()}
        if bad and self.on_bad_image == "stop":
            raise InputError(
                f"{len(bad)} of {sum(map(len, self._files.values()))} images cannot be decoded: {_first(bad)}. "
                "Replace them, or leave them out with on_bad_image=skip"
            )

    @cached_property
    def _files(self) -> dict[Split, list[tuple[Path, int]]]:
        """Files and labels in a fixed order, by class and then by path."""
        return {
            split: [(path, label) for label, name in enumerate(self.classes) for path in _images_below(folder / name)]
            for split, folder in self.folders.items()
        }

    @cached_property
    def _bad(self) -> dict[Split, dict[Path, str]]:
        """The files that cannot be decoded and why; warns of those that will be skipped."""
        bad = {s: undecodable(folder, [path for path, _ in self._files[s]]) for s, folder in self.folders.items()}
        every = {path: why for split in self.splits for path, why in bad[split].items()}
        if every and self.on_bad_image == "skip":
            log.warning("%d images cannot be decoded and are left out: %s", len(every), _first(every))
        return bad


def _first(bad: dict[Path, str]) -> str:
    shown = [f"{path} ({why})" for path, why in list(bad.items())[:_SHOWN]]
    return "; ".join(shown + (["..."] if len(bad) > _SHOWN else []))


def _class_names(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no subfolders; expected one per class")
    return tuple(names)


def _images_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = (Path(parent, name) for name in files if not name.startswith("."))
        found += [path for path in visible if path.suffix.lower() in SUFFIXES]
    return sorted(found)
