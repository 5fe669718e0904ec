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
    """Where an image cannot be read, another of the same batch takes its place, label and all; each is told of once.

    A batch none of whose images can be read is an InputError all the same.

    Attributes:
        unread: why an image could not be read, by its position.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.unread: dict[int, str] = {}

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
            return fetch(self.dataset, self._readable(indices, error))

    def _readable(self, indices: Tensor, error: InputError) -> Tensor:
        """The positions with the first that can be read in place of those that cannot."""
        good = torch.tensor([self._can_read(index) for index in indices.tolist()])
        if not good.any() or good.all():  # nothing to put in their place, or nothing wrong with any by itself
            raise error
        return torch.where(good, indices, indices[good][0])

    def _can_read(self, index: int) -> bool:
        try:
            fetch(self.dataset, [index])
        except InputError as error:
            if index not in self.unread:
                self.unread[index] = str(error)
                log.warning("%s: another image takes its place (%d so far)", error, len(self.unread))
            return False
        return True
