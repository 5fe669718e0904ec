"""Any data set of torch or torchvision."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data.base import SPLITS, DataSource, Images, Split, class_difference
from adamerge.data.decoding import reason
from adamerge.data.preprocess import Preprocess
from adamerge.errors import InputError

Given = Callable[[], Dataset[Any]] | Dataset[Any]

#: Where data sets of torchvision keep labels, and pairs of something and a label. Most have one of them.
_LABELS = ("targets", "labels", "_labels", "y")
_PAIRS = ("samples", "_samples")


class TorchImages(Images):
    """A torch data set of (image, label) with its labels read ahead."""

    def __init__(self, data: Dataset[Any], labels: Tensor, preprocess: Preprocess, name: str) -> None:
        super().__init__(labels, preprocess)
        self.data, self.name = data, name

    def image(self, index: int) -> Any:
        try:
            return self.data[index][0]
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
            raise InputError(f"{self.where(index)} cannot be decoded: {reason(error)}") from error

    def where(self, index: int) -> str:
        return f"{self.name}, image {index}"


class TorchData(DataSource):
    """Data sets that give (PIL image or uint8 array, integer label), such as those of torchvision, without a transform.

    Args:
        train: the data set to train on, or a function that opens it; in YAML, a `class_path` such as
            `torchvision.datasets.MNIST` and its `init_args`, opened when it is first used.
        test: likewise, to adapt and to score on.
        classes: class names, in the order of the labels; default: `classes` of the data set, else the labels as text.
    """

    def __init__(self, train: Given | None = None, test: Given | None = None, classes: list[str] | None = None) -> None:
        if train is None and test is None:
            raise InputError("TorchData needs a data set: give train, test or both")
        self._given: dict[Split, Given | None] = {"train": train, "test": test}
        self._names = None if classes is None else tuple(classes)
        self._opened: dict[Split, tuple[Dataset[Any], Tensor]] = {}

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in SPLITS if self._given[split] is not None)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        if self._names is not None:
            return self._names
        own = {split: _class_names(self._open(split)[0]) for split in self.splits}
        named = {split: names for split, names in own.items() if names}
        if len(named) == 2 and (difference := class_difference(named["train"], named["test"])):
            raise InputError(f"its test data set has not the classes of its train data set: {difference}")
        if named:
            return next(iter(named.values()))
        highest = max((int(labels.max()) for _, labels in map(self._open, self.splits) if len(labels)), default=-1)
        return tuple(str(label) for label in range(highest + 1))

    def dataset(self, split: Split, preprocess: Preprocess) -> TorchImages:
        data, labels = self._open(split)
        return TorchImages(data, labels, preprocess, f"{type(data).__name__}, {split} split")

    def _open(self, split: Split) -> tuple[Dataset[Any], Tensor]:
        """The data set and its labels [N]."""
        if split not in self._opened:
            given = self._given[split]
            if given is None:
                raise InputError(f"no {split} data set was given; there is only {self.splits[0]}")
            data = given if isinstance(given, Dataset) else _build(given, split)
            self._opened[split] = data, _labels(data)
        return self._opened[split]


def _build(opener: Callable[[], Dataset[Any]], split: Split) -> Dataset[Any]:
    try:
        return opener()
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        raise InputError(f"the {split} data set cannot be opened: {error or type(error).__name__}") from error


def _class_names(data: Dataset[Any]) -> tuple[str, ...]:
    names: Any = getattr(data, "classes", None) or getattr(data, "categories", None) or ()
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _labels(data: Dataset[Any]) -> Tensor:
    """Labels [N], without decoding images where the data set keeps them in a list."""
    if not hasattr(data, "__len__"):
        raise InputError(f"{type(data).__name__} has no length; expected a data set with len() and items by index")
    count = len(data)
    if count and getattr(data, "target_transform", None) is None:
        kept: Any = [getattr(data, name, None) for name in _LABELS]
        kept += [_seconds(getattr(data, name, None)) for name in _PAIRS]
        for labels in map(_integers, kept):
            if labels is not None and len(labels) == count and all(labels[i] == data[i][1] for i in (0, count - 1)):
                return labels
    labels = _integers([data[i][1] for i in range(count)])
    if labels is None:
        raise InputError(f"{type(data).__name__} must give (image, integer label); its first label is {data[0][1]!r}")
    return labels


def _seconds(pairs: Any) -> list[Any] | None:
    fits = isinstance(pairs, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs)
    return [pair[1] for pair in pairs] if fits else None


def _integers(values: Any) -> Tensor | None:
    """int64 [N] of any list of integers, `None` for anything else."""
    if values is None:
        return None
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        return None
    if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
        return None
    return torch.tensor(array.astype(np.int64))
