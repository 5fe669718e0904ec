"""How deltas are stored, where [K, *shape] in float32 is too much."""

from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import AnyDeltas, changed
from adamerge.errors import InputError
from adamerge.files import cache_folder
from adamerge.kinds import kind
from adamerge.rules.base import Transform
from adamerge.sharded import Sharded, own_entries
from adamerge.stored import Stored, in_file
from adamerge.task_vectors import TaskVectors

#: Bits that deltas take, by name.
_DTYPES = {"same": None, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Store(Transform):
    """Keeps dense deltas in fewer bits, or elsewhere than the model: `Stored`, decoded block by block at every use.

    Put it last. What earlier transforms have made smaller already stays as it is, and so does what no expert changed.
    Read from files, no more than one tensor of all experts is in memory at a time.

    Args:
        dtype: `same`; `bfloat16`, two bytes an entry with eight bits of precision; `int8`, a byte an entry and a scale
            for every 128, which puts it within 1/254 of the largest of these.
        place: `memory`, wherever the model is moved; `host`, in the processor's memory while a GPU computes, to which
            blocks are copied ahead of their use; `disk`, in files, which the system keeps in memory for as long as
            there is room, have no name and vanish with the process; `processes`, every process of a run with its own
            share of the entries of all experts (see `adamerge.sharded.Sharded`), of which there must be several.
        folder: for these files. Default: the user's cache.
    """

    def __init__(
        self,
        dtype: Literal["same", "bfloat16", "int8"] = "bfloat16",
        place: Literal["memory", "host", "disk", "processes"] = "memory",
        folder: str | Path | None = None,
    ) -> None:
        if dtype not in _DTYPES or place not in ("memory", "host", "disk", "processes"):
            raise InputError(f"Store(dtype={dtype!r}, place={place!r}): there is no such form")
        self.dtype, self.place, self.folder = _DTYPES[dtype], place, folder

    @torch.no_grad()
    def __call__(self, task_vectors: TaskVectors) -> TaskVectors:
        if self.place == "processes" and not (dist.is_available() and dist.is_initialized()):
            raise InputError("Store(place='processes') needs several: set trainer.devices and trainer.strategy=ddp")
        return task_vectors.changed(lambda name, deltas: self.stored(name, deltas, meta(task_vectors.base, name)))

    def stored(self, name: str, deltas: AnyDeltas, like: Tensor) -> AnyDeltas:
        """The new deltas of one tensor, whose base is like this one."""
        if not isinstance(deltas, Tensor) or kind(name, like) != "parameter" or not changed(deltas):
            return deltas
        if self.place == "processes":
            return Sharded(self._smaller(own_entries(deltas)), deltas.shape)
        return self._smaller(deltas)

    def _smaller(self, deltas: Tensor) -> AnyDeltas:
        if self.place in ("memory", "processes") and self.dtype is None:
            return deltas
        stored = Stored.from_dense(deltas, self.dtype or deltas.dtype)
        return stored.kept(self._move) if self.place in ("host", "disk") else stored

    def _move(self, tensor: Tensor) -> Tensor:
        if self.place == "disk":
            return in_file(tensor, Path(self.folder) if self.folder else cache_folder() / "deltas")
        return tensor.cpu().pin_memory() if torch.cuda.is_available() else tensor.cpu()
