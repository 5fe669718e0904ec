"""Images on the device that computes: they travel in 8 bits, become floats there, and may stay."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from adamerge import InputError
from adamerge.data import Images, fetch, labels_of
from adamerge.data.preprocess import InBytes
from trainers.loading import load

log = logging.getLogger(__name__)

#: What to adapt on and what to score, by task.
Parts = dict[str, tuple[Dataset[Any], Dataset[Any]]]
#: Of the memory that is free, images take no more than this; a merge, its gradients and activations have the rest.
SHARE = 0.5
#: How many images a process reads at once.
_CHUNK = 64


class Placed(Dataset[tuple[Tensor, int]]):
    """The images of a data set as floats on a device, bit for bit what the data set itself would give.

    They are read in 8 bits, copied from pinned memory while the device computes, and normalised there. A process that
    loads for others has no device: it gives the 8 bits, of which `floats` makes the rest where they arrive.

    Args:
        dataset: of images `in_bytes`, or a part of one.
        device: where they are wanted.
        num_workers: processes that read images which are to stay: all of the data set, when the first is asked for; 0
            reads them in this one, as they are asked for.

    Attributes:
        keep: leave the 8 bits of an image on the device once it was read, so that it is neither read nor moved again.
    """

    def __init__(self, dataset: Dataset[Any], device: torch.device, num_workers: int = 0) -> None:
        root: Images | None = within(dataset, Images)
        assert root is not None
        self.dataset, self.device, self.num_workers, self.keep = dataset, device, num_workers, False
        self.labels, self.preprocess, self._sides = labels_of(dataset), root.preprocess, root.sides
        self._there = torch.zeros(len(self.labels), dtype=torch.bool)
        self._kept: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(torch.tensor([index]))
        return images[0], int(labels)

    @property
    def nbytes(self) -> int | None:
        """What all images take in 8 bits; none where they may differ in size."""
        return None if self._sides is None else len(self) * 3 * self._sides[0] * self._sides[1]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As `adamerge.data.fetch`: images [B, 3, H, W] on the device, labels [B] in host memory."""
        if get_worker_info() is not None:
            return fetch(self.dataset, indices)
        if not self.keep or not len(indices):
            images, labels = fetch(self.dataset, indices)
            return self.floats(images), labels
        if not self._there[indices].all():
            self._read(indices)
        assert self._kept is not None
        return self.preprocess.normalize(self._kept[moved(indices, self.device)]), self.labels[indices]

    def floats(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float on the device; what is float already stays as it is."""
        return self.preprocess.normalize(moved(images, self.device)) if images.dtype == torch.uint8 else images

    def _read(self, indices: Tensor) -> None:
        """Keep these images; with worker processes, all others too."""
        if self.num_workers:
            parts = (~self._there).nonzero().flatten().split(_CHUNK)
            log.info("reading %d images, once, by %d processes", sum(map(len, parts)), self.num_workers)
            for index, images in load(_Chunks(self.dataset, parts), range(len(parts)), self.num_workers):
                self._put(index, images)
        missing = indices[~self._there[indices]].unique()  # what processes could not read is told of here
        self._put(missing, fetch(self.dataset, missing)[0])

    def _put(self, indices: Tensor, images: Tensor) -> None:
        if not len(indices):
            return
        with torch.inference_mode(False):  # else a step could not add to what an evaluation has begun
            if self._kept is None:
                self._kept = torch.empty(len(self), *images.shape[1:], dtype=images.dtype, device=self.device)
            self._kept[moved(indices, self.device)] = moved(images, self.device)
        self._there[indices] = True


class _Chunks(Dataset[tuple[Tensor, Tensor]]):
    """Positions and images, so many at once; none where one of them cannot be read."""

    def __init__(self, dataset: Dataset[Any], parts: Sequence[Tensor]) -> None:
        self.dataset, self.parts = dataset, parts

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor]:
        index = self.parts[chunk]
        try:
            return index, fetch(self.dataset, index)[0]
        except InputError:
            return index[:0], index


def in_bytes(dataset: Dataset[Any]) -> Dataset[Any]:
    """The same images in 8 bits; a data set that is none of `Images` as it is."""
    if not isinstance(dataset, Images):
        return dataset
    own = copy.copy(dataset)
    own.preprocess = InBytes(dataset.preprocess.size, dataset.preprocess.mean, dataset.preprocess.std)
    return own


def within(dataset: Any, kind: type[Any]) -> Any:
    """The data set of that kind that this is, or a part or a view of; none where there is none."""
    while not isinstance(dataset, kind):
        if not hasattr(dataset, "dataset"):
            return None
        dataset = dataset.dataset
    return dataset


def placed(dataset: Any) -> Placed | None:
    """The data set on a device that this is, or a view of."""
    found: Placed | None = within(dataset, Placed)
    return found


def place(parts: Parts, device: torch.device, num_workers: int, keep: bool | None) -> Parts:
    """The same data sets with their images on a device, but for those that are none of `Images`.

    With `keep` they stay there; by default, if it is a GPU and `SHARE` of its free memory is enough. Raises InputError
    for images that are to stay and may differ in size.
    """
    found = {id(each): each for pair in parts.values() for each in pair if within(each, Images) is not None}
    on_device = {key: Placed(each, device, num_workers) for key, each in found.items()}
    sizes = [each.nbytes for each in on_device.values()]
    if keep and None in sizes:
        raise InputError("images of different sizes cannot stay on a device: give preprocess a size")
    if keep is None:
        keep = bool(sizes) and None not in sizes and _fit(sum(size or 0 for size in sizes), device)
    for each in on_device.values():
        each.keep = keep
    return {task: (on_device.get(id(a), a), on_device.get(id(b), b)) for task, (a, b) in parts.items()}


def _fit(needed: int, device: torch.device) -> bool:
    """Whether images of so many bytes leave enough memory free on a GPU; nobody knows of other devices."""
    if device.type != "cuda":
        return False
    free = free_memory(device)
    fits = needed <= SHARE * free
    what = f"leaves {(free - needed) / 1e9:.2f} GB for the rest" if fits else "is too much: they move anew at each step"
    log.info("Images take %.2f GB of %.2f GB that are free on %s, which %s", needed / 1e9, free / 1e9, device, what)
    return fits


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, with those that torch keeps for what comes."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; to a GPU by way of pinned memory, without waiting for what the GPU still has to do."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
