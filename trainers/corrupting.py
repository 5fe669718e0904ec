"""Data sets whose images are corrupted as they are read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge import InputError
from adamerge.corruptions import Corruption
from adamerge.data import Preprocess, fetch, labels_of
from trainers.seeding import generator


class Corrupted(Dataset[tuple[Tensor, int]]):
    """A data set with corrupted images; what is drawn for an image depends on (seed, task, image) alone.

    Args:
        dataset: of images that a `Preprocess` made.
        task: whose.
        corruptions: one or several.
        which: int64 [N], the one of each image.
        seed: of what they draw.

    Raises:
        InputError: for images of which nobody knows how they were normalised.
    """

    def __init__(
        self, dataset: Dataset[Any], task: str, corruptions: Sequence[Corruption], which: Tensor, seed: int
    ) -> None:
        self.dataset, self.task, self.corruptions, self.which, self.seed = dataset, task, corruptions, which, seed
        self.preprocess = preprocess_of(dataset, task)

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(torch.tensor([index]))
        return images[0], int(labels)

    @property
    def labels(self) -> Tensor:
        """Labels [N]."""
        return labels_of(self.dataset)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As `adamerge.data.fetch`."""
        given, labels = fetch(self.dataset, indices)
        in_bytes = given.dtype == torch.uint8
        images = self.preprocess.normalize(given) if in_bytes else given
        mean, std = (torch.tensor(stats).view(3, 1, 1) for stats in (self.preprocess.mean, self.preprocess.std))
        for image, out, index in zip(images, given, indices.tolist(), strict=True):
            rng = generator(self.seed, "corruption", self.task, _origin(self.dataset, index))
            seen = self.corruptions[int(self.which[index])](image * std + mean, rng)
            seen = (255 * seen).round()  # 8 bits, as a file would have
            out.copy_(seen if in_bytes else (seen / 255 - mean) / std)
        return given, labels


def preprocess_of(dataset: Any, task: str) -> Preprocess:
    """How the images of a data set, or of a part of one, were normalised."""
    while not isinstance(found := getattr(dataset, "preprocess", None), Preprocess):
        if not hasattr(dataset, "dataset"):
            raise InputError(
                f"task {task!r}: images of {type(dataset).__name__} cannot be corrupted, since it has no `preprocess`"
            )
        dataset = dataset.dataset
    return found


def _origin(dataset: Any, index: int) -> int:
    """The position of an image in the whole data set, of which this may be a part."""
    while hasattr(dataset, "indices"):
        dataset, index = dataset.dataset, int(dataset.indices[index])
    return index
