"""Data sets some of whose images can no longer be read."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.data.base import fetch, labels_of
from adamerge.errors import InputError

log = logging.getLogger(__name__)


class Substituted(Dataset[tuple[Tensor, int]]):
    """Leaves out images that cannot be read, where `readable` is asked; each is told of once.

    For who needs as many images as were asked for, `batch` has another of the same batch in the place of each, label
    and all; a batch none of whose images can be read is an InputError then.

    Args:
        dataset: the images.
        unread: why an image could not be read, by its position; added to.
    """

    def __init__(self, dataset: Dataset[Any], unread: dict[int, str] | None = None) -> None:
        self.dataset = dataset
        self.unread: dict[int, str] = {} if unread is None else unread

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item: tuple[Tensor, int] = self.dataset[index]
        return item

    @property
    def labels(self) -> Tensor:
        """As those of the data set, whatever can be read."""
        return labels_of(self.dataset)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As `adamerge.data.fetch`."""
        try:
            return fetch(self.dataset, indices)
        except InputError as error:
            good = self._good(indices, error)
            if not good.any():
                raise
            return fetch(self.dataset, torch.where(good, indices, indices[good][0]))

    def readable(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the positions whose images can be read, with images and labels; possibly none."""
        try:
            return indices, *fetch(self.dataset, indices)
        except InputError as error:
            kept = indices[self._good(indices, error)]
            return kept, *(fetch(self.dataset, kept) if len(kept) else (torch.empty(0), kept))

    def _good(self, indices: Tensor, error: InputError) -> Tensor:
        """Whether each image can be read; raises the error where nothing is wrong with any by itself."""
        good = torch.tensor([self._can_read(index) for index in indices.tolist()])
        if good.all():
            raise error
        return good

    def _can_read(self, index: int) -> bool:
        try:
            fetch(self.dataset, [index])
        except InputError as error:
            if index not in self.unread:
                self.unread[index] = str(error)
                log.warning("%s: it is left out (%d so far)", error, len(self.unread))
            return False
        return True


def fetch_readable(dataset: Dataset[Any], indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, images and labels: of all, or of those that can be read where the others are left out."""
    return dataset.readable(indices) if isinstance(dataset, Substituted) else (indices, *fetch(dataset, indices))
