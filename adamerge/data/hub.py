"""Data sets of the Hugging Face hub, or folders in one of its formats."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adamerge.data.base import SPLITS, DataSource, Images, Split, class_difference
from adamerge.data.decoding import reason
from adamerge.data.preprocess import Preprocess
from adamerge.errors import InputError
from adamerge.fetching import persistently
from adamerge.files import expanded


class HubImages(Images):
    """The images of one column of a Hugging Face data set."""

    def __init__(self, data: Any, column: str, labels: Tensor, preprocess: Preprocess, name: str) -> None:
        super().__init__(labels, preprocess)
        self.data, self.column, self.name = data.select_columns([column]), column, name

    def image(self, index: int) -> Any:
        try:
            return self.data[index][self.column]
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{self.where(index)} cannot be decoded: {reason(error)}") from error

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"


class HubData(DataSource):
    """A data set that `datasets.load_dataset` or `load_from_disk` opens; downloaded once, into the Hub's own cache.

    Classes are the names of the label column; without names, its texts in alphabetical order, or 0 to its maximum.

    Args:
        path: a Hub id such as `ufldl-stanford/svhn`, a folder of parquet files, or one saved by `save_to_disk`.
        train: what its split to train on is called; none if it has none.
        test: what its split to adapt and to score on is called.
        image: the column of images.
        label: the column of labels, integers or text.
        name: which of the data set's configurations.
    """

    def __init__(
        self,
        path: str,
        train: str | None = "train",
        test: str | None = "test",
        image: str = "image",
        label: str = "label",
        name: str | None = None,
    ) -> None:
        if train is None and test is None:
            raise InputError(f"{path}: give the name of a split: train, test or both")
        self.path, self.image, self.label, self.name = path, image, label, name
        self._split_names: dict[Split, str | None] = {"train": train, "test": test}
        self._opened: dict[Split, Any] = {}

    @property
    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in SPLITS if self._split_names[split] is not None)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        named = [getattr(self._open(split).features[self.label], "names", None) for split in self.splits]
        if difference := class_difference(named[0] or (), named[-1] or ()):
            raise InputError(f"{self.path}: its test split has not the classes of its train split: {difference}")
        if named[0] is not None:
            return tuple(named[0])
        values = {value for split in self.splits for value in self._values(split)}
        if all(isinstance(value, str) for value in values):
            return tuple(sorted(values))
        return tuple(str(label) for label in range(max(values) + 1))

    def dataset(self, split: Split, preprocess: Preprocess) -> HubImages:
        data, values = self._open(split), self._values(split)
        if values and isinstance(values[0], str):
            position = {name: label for label, name in enumerate(self.classes)}
            values = [position[value] for value in values]
        labels = torch.tensor(values, dtype=torch.int64)
        return HubImages(data, self.image, labels, preprocess, f"{self.path}, {self._split_names[split]} split")

    def _values(self, split: Split) -> list[Any]:
        """The label column: all integers or all text."""
        values = self._open(split).select_columns([self.label])[:][self.label]
        for kind in (int, str):
            if all(isinstance(value, kind) for value in values):
                return list(values)
        odd = next(value for value in values if not isinstance(value, int))
        raise InputError(f"{self.path}: column {self.label!r} must hold integers or text throughout, but has {odd!r}")

    def _open(self, split: Split) -> Any:
        """The rows of one split, with images that decode to PIL."""
        if split not in self._opened:
            if self._split_names[split] is None:
                raise InputError(f"{self.path}: no {split} split was named")
            self._opened[split] = self._checked(self._load(split))
        return self._opened[split]

    def _load(self, split: Split) -> Any:
        import datasets

        folder, name = expanded(self.path), self._split_names[split]
        try:
            if not any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
                where = str(folder) if folder.exists() else self.path
                return persistently(lambda: datasets.load_dataset(where, self.name, split=name), self.path)
            saved = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
            hint = "; check the name and the network, or give a local folder" if isinstance(error, OSError) else ""
            raise InputError(f"{self.path}, split {name!r}, cannot be opened: {reason(error)}{hint}") from error
        if isinstance(saved, datasets.Dataset):
            if len(self.splits) == 2:
                raise InputError(f"{self.path} has no splits: name one of train and test, and give null for the other")
            return saved
        if name not in saved:
            raise InputError(f"{self.path} has no split {name!r}; it has {', '.join(saved)}")
        return saved[name]

    def _checked(self, data: Any) -> Any:
        import datasets

        for option, column in (("image", self.image), ("label", self.label)):
            if column not in data.column_names:
                columns = ", ".join(data.column_names)
                raise InputError(f"{self.path} has no column {column!r}; give {option} one of {columns}")
        data = data.with_format(None)
        if data.features[self.image] == datasets.Image():
            return data
        try:  # bytes, or images that are not to be decoded
            return data.cast_column(self.image, datasets.Image())
        except (TypeError, ValueError, RuntimeError) as error:
            kind = data.features[self.image]
            raise InputError(f"{self.path}: column {self.image!r} holds {kind}, not images") from error
