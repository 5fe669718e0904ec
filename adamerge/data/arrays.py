"""Images that lie in memory, and `.npz` files of them."""

import zipfile
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adamerge.data.base import SPLITS, DataSource, Images, Split
from adamerge.data.decoding import reason
from adamerge.data.preprocess import Pixels, Preprocess
from adamerge.errors import InputError
from adamerge.files import expanded

Array = npt.NDArray[Any]


class ArrayImages(Images):
    """uint8 [N, H, W, 3] or [N, H, W] with int labels [N]; whole batches are preprocessed at once.

    Raises InputError for other types, shapes or lengths; `name` says whose they are.
    """

    def __init__(self, images: Pixels, labels: Array | Tensor, preprocess: Preprocess, name: str = "images") -> None:
        images, labels = np.asarray(images), np.asarray(labels)
        if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))):
            got = f"{images.dtype} {list(images.shape)}"
            raise InputError(f"{name}: expected images as uint8 [N, H, W, 3] or [N, H, W], got {got}")
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise InputError(f"{name}: expected {len(images)} integer labels, got {labels.dtype} {list(labels.shape)}")
        super().__init__(torch.tensor(labels, dtype=torch.int64), preprocess)
        self.images, self.name = images, name

    def image(self, index: int) -> Array:
        return self.images[index]

    @property
    def sides(self) -> tuple[int, int]:
        height, width = self.images.shape[1:3]
        return super().sides or (height, width)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] and labels [B]."""
        return self.preprocess.batch(self.images[indices.numpy()]), self.labels[indices]

    def where(self, index: int) -> str:
        return f"{self.name}, image {index}"


class Npz(DataSource):
    """One `.npz` file: x_train and x_test uint8 [N, H, W, 3] or [N, H, W], y_train and y_test int [N], classes str [C].

    One of the splits may be missing. Nothing in it is unpickled.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        self._splits: dict[Split, tuple[Array, Array]] = {}

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in SPLITS if f"x_{split}" in self._names)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        names = self._read("classes")
        if names.ndim != 1 or names.dtype.kind != "U":
            raise InputError(f"{self.path}: classes must be a list of names, got {names.dtype} {list(names.shape)}")
        return tuple(names.tolist())

    def dataset(self, split: Split, preprocess: Preprocess) -> ArrayImages:
        if split not in self._splits:
            self._splits[split] = self._read(f"x_{split}"), self._read(f"y_{split}")
        return ArrayImages(*self._splits[split], preprocess, name=f"{self.path}, {split} split")

    def check(self) -> None:
        if not self.splits:
            raise InputError(f"{self.path} has neither x_train nor x_test; it holds {_list(self._names)}")
        super().check()
        if not self.classes:
            raise InputError(f"{self.path}: classes is empty")

    @cached_property
    def _names(self) -> frozenset[str]:
        with self._open() as file:
            return frozenset(file.files)

    def _open(self) -> Any:
        if not self.path.is_file():
            raise InputError(f"no such file: {self.path}")
        if not zipfile.is_zipfile(self.path):
            raise InputError(f"{self.path} is no npz file, or truncated")
        return np.load(self.path, allow_pickle=False)

    def _read(self, key: str) -> Array:
        with self._open() as file:
            if key not in file:
                raise InputError(f"{self.path} has no {key}; it holds {_list(file.files)}")
            try:
                return np.asarray(file[key])
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise InputError(f"{self.path}: {key} cannot be read: {reason(error)}") from error


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
