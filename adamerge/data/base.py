"""What every source of images offers, how batches are taken from it, and what is checked before work starts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data.preprocess import Preprocess
from adamerge.errors import InputError

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


class Images(Dataset[tuple[Tensor, int]], ABC):
    """Labelled images: item i is (float [3, H, W], label). Labels are known without decoding an image.

    Attributes:
        labels: int64 [N].
        preprocess: how an image becomes a tensor.
    """

    def __init__(self, labels: Tensor, preprocess: Preprocess) -> None:
        self.labels, self.preprocess = labels, preprocess

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = int(self.labels[index])  # first, since it raises IndexError past the end
        return self.preprocess(self.image(index)), label

    @abstractmethod
    def image(self, index: int) -> Any:
        """What `preprocess` takes: a PIL image or a uint8 array."""

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of all images, where they are known without decoding one."""
        return None if self.preprocess.size is None else (self.preprocess.size, self.preprocess.size)

    def where(self, index: int) -> str:
        """How an error message calls an image: its file, if it has one."""
        return f"image {index}"


class DataSource(ABC):
    """Images of one task. Cheap to build: `classes`, `dataset` and `check` open files and raise InputError."""

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits it has."""
        return SPLITS

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""

    @abstractmethod
    def dataset(self, split: Split, preprocess: Preprocess) -> Dataset[tuple[Tensor, int]]:
        """The labelled images of one split. Raises InputError for a split that it does not have."""

    def check(self) -> None:
        """Raise InputError for files that are missing or cannot be read."""
        for split in self.splits:
            dataset = self.dataset(split, Preprocess())
            if len(dataset):  # type: ignore[arg-type]
                dataset[0]


def fetch(dataset: Dataset[Any], indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] and int64 labels [B] at `indices`, by the data set's own `batch` if it has one.

    Otherwise items are stacked; raises InputError if they differ in size.
    """
    indices = torch.as_tensor(indices, dtype=torch.int64)
    if hasattr(dataset, "batch"):
        images, labels = dataset.batch(indices)
        return images, labels
    if not len(indices):  # an empty share of a batch: the shape of an image still counts
        some = dataset[0][0] if len(dataset) else torch.empty(3, 0, 0)  # type: ignore[arg-type]
        return some.new_empty(0, *some.shape), indices
    items = [dataset[i] for i in indices.tolist()]
    shapes = [list(image.shape) for image, _ in items]
    if odd := [i for i, shape in enumerate(shapes) if shape != shapes[0]]:
        raise InputError(
            f"images {int(indices[0])} and {int(indices[odd[0]])} differ in shape, {shapes[0]} and {shapes[odd[0]]}: "
            "give preprocess a size"
        )
    return torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items])


def labels_of(dataset: Dataset[Any]) -> Tensor:
    """All labels, int64 [N]: the data set's `labels` where it has them; else every item is read."""
    if hasattr(dataset, "labels"):
        return torch.as_tensor(dataset.labels, dtype=torch.int64)
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))], dtype=torch.int64)  # type: ignore[arg-type]


def check_data(task: str, data: DataSource | Dataset[Any], classes: Sequence[str] | None = None) -> None:
    """Raise InputError, naming the task, for unreadable files, an empty split, or a label outside of `classes`.

    `classes` may be left out for a source: then its own are meant.
    """
    try:
        if isinstance(data, DataSource):
            data.check()
            parts = {f"{split} split": data.dataset(split, Preprocess()) for split in data.splits}
            classes = data.classes if classes is None else classes
        else:
            parts = {"data set": data}
        labels = {part: labels_of(dataset) for part, dataset in parts.items()}
    except InputError as error:
        raise InputError(f"task {task!r}: {error}") from error
    if not parts:
        raise InputError(f"task {task!r} has neither a train nor a test split")
    for part, dataset in parts.items():
        _check_labels(f"task {task!r}: its {part}", dataset, labels[part], len(classes or ()))


def _check_labels(whose: str, dataset: Dataset[Any], labels: Tensor, classes: int) -> None:
    if not len(labels):
        raise InputError(f"{whose} has no image")
    outside = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if outside:
        index = outside[0]
        where = dataset.where(index) if isinstance(dataset, Images) else f"image {index}"
        more = f" and {len(outside) - 1} more such labels" if len(outside) > 1 else ""
        raise InputError(
            f"{whose} has label {int(labels[index])} at {where}{more}; its {classes} classes are 0 to {classes - 1}"
        )


def class_difference(expected: Sequence[str], found: Sequence[str]) -> str:
    """In what two class lists first differ, in number, names or order; empty if they are equal."""
    if tuple(expected) == tuple(found):
        return ""
    label = next((i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), None)
    label = min(len(expected), len(found)) if label is None else label
    here, there = (repr(names[label]) if label < len(names) else "none" for names in (expected, found))
    counts = f"expected {len(expected)} classes, found {len(found)}; " if len(expected) != len(found) else ""
    return f"{counts}class {label}: expected {here}, found {there}"


def split_held_out(dataset_length: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted int64 indices (adapt, held out) that share nothing and cover 0 .. N−1; the same for the same arguments.

    round(fraction · N) images are held out; for 0 < fraction < 1 both parts have at least one. Raises InputError for
    another fraction or too few images.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"the fraction to hold out must be in [0, 1), got {fraction}")
    if fraction and dataset_length < 2:
        raise InputError(f"{dataset_length} image cannot be split into one part to adapt on and one to hold out")
    count = min(max(round(fraction * dataset_length), 1), dataset_length - 1) if fraction else 0
    order = torch.randperm(dataset_length, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values
