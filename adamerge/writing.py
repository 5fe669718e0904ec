"""Write a merge that is never in memory as a whole: sharded safetensors, row by row, resumed where a run was killed."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from adamerge.files import room_for, write_text
from adamerge.fused import Joined
from adamerge.rules.combining import MergedState
from adamerge.tensor_files import header
from adamerge.threads import WORKERS, in_order

#: The tensors of every file, without data, in the order in which they are written.
Layout = Mapping[str, Mapping[str, Tensor]]

_INDEX = "model.safetensors.index.json"


def layout(tensors: Mapping[str, Tensor], shard_size: int) -> Layout:
    """Tensors by file: `model.safetensors`, or as many shards of at most `shard_size` bytes as it takes."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > shard_size and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def write_weights(
    state: MergedState | Joined, files: Layout, folder: Path, advance: Callable[[int], object] = lambda count: None
) -> None:
    """Write the files of a layout, and their index if they are several; `advance` is told of bytes as they are done.

    Tensors that are in the folder whole are left as they are: a file's length says how far it got. Parts are computed
    ahead, in threads, while others are written.

    Raises:
        InputError: when the disk is full; what is written stays, to go on from.
    """
    todo = {file: _unfinished(folder / file, tensors, advance) for file, tensors in files.items()}
    parts = ((name, rows) for names in todo.values() for name in names for rows in state.pieces(name))
    workers = WORKERS if state.elementwise else 1
    done = in_order(lambda part: state.part(*part).cpu(), parts, workers)
    for file, names in todo.items():
        with room_for(folder / file), (folder / file).open("ab") as out:
            for name in names:
                _write(out, done, files[file][name].nbytes, advance)
    if len(files) > 1:
        total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        where = {name: file for file, tensors in files.items() for name in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_text(folder / _INDEX, json.dumps(index, indent=2) + "\n")


def _unfinished(path: Path, tensors: Mapping[str, Tensor], advance: Callable[[int], object]) -> list[str]:
    """The tensors that a file does not have yet, after the file has been cut, or begun, to end before the first."""
    start = header(tensors, {"format": "pt"})
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(start)) == start:
                end, names = len(start), list(tensors)
                while names and end + tensors[names[0]].nbytes <= path.stat().st_size:
                    end += tensors[names.pop(0)].nbytes
                os.truncate(path, end)
                advance(end - len(start))
                return names
    path.write_bytes(start)
    return list(tensors)


def _write(out: BinaryIO, parts: Iterator[Tensor], size: int, advance: Callable[[int], object]) -> None:
    """Write parts until a tensor's bytes are complete."""
    if size == 0:
        next(parts)
    while size > 0:
        part = next(parts).contiguous()
        out.write(part.view(-1).view(torch.uint8).numpy().data)
        size -= part.nbytes
        advance(part.nbytes)
