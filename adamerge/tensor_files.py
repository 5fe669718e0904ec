"""The safetensors format: rows of tensors read from files, and files written row by row.

Files are read by position, never mapped: mapped pages count as resident, and a merge is judged by its peak.
"""

import json
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adamerge.errors import InputError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LARGEST = 2**40  # rows, or columns
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class _Reader:
    """A file that is open as long as somebody has this object; several threads, and forked processes, may read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)

    def into(self, buffer: memoryview, offset: int) -> int:
        """Fill the buffer, as far as one call does, with what follows this byte; 0 at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file, [buffer], offset)
        with self.path.open("rb", buffering=0) as file:  # on Windows
            file.seek(offset)
            return file.readinto(buffer) or 0


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie."""

    path: Path
    code: str
    shape: tuple[int, ...]
    start: int


class SafetensorsState(Mapping[str, Tensor]):
    """A state dict over one or more safetensors files: a tensor's bytes, or some rows', are read when asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        headers = {path: _places(path) for path in dict.fromkeys(files.values())}
        self._places = {name: headers[path][name] for name, path in files.items()}
        self._reader: _Reader | None = None  # of one file at a time: there may be more shards than files can be open

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return self._read(name, 0, place.shape)

    def __contains__(self, name: object) -> bool:  # the inherited one would read the tensor
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some consecutive rows of one tensor."""
        shape = self._places[name].shape
        start, stop, _ = rows.indices(shape[0])
        return self._read(name, start, (max(stop - start, 0), *shape[1:]))

    def meta(self, name: str) -> Tensor:
        """A tensor of that name's shape and dtype without data, from the file's header."""
        return torch.empty(self._places[name].shape, dtype=self._dtype(name), device="meta")

    def _dtype(self, name: str) -> torch.dtype:
        place = self._places[name]
        if place.code not in _DTYPES:
            raise InputError(f"{place.path}: {name} is stored as {place.code}, which cannot be merged")
        return _DTYPES[place.code]

    def _read(self, name: str, row: int, shape: tuple[int, ...]) -> Tensor:
        """`shape` from this row on."""
        place, tensor = self._places[name], torch.empty(shape, dtype=self._dtype(name), device="cpu")
        if not tensor.numel():
            return tensor
        offset = place.start + row * tensor.nbytes // max(shape[0], 1) if shape else place.start
        buffer = tensor.view(-1).view(torch.uint8).numpy().data
        reader = self._reader
        if reader is None or reader.path != place.path:
            reader = self._reader = _Reader(place.path)
        done = 0
        while done < len(buffer):  # one call reads 2 GiB at most
            if not (count := reader.into(buffer[done:], offset + done)):
                raise InputError(f"{place.path} ends within {name}: it was changed while it was read")
            done += count
        return tensor


def names_in(path: Path) -> list[str]:
    """The names of the tensors in a file."""
    with _open(path) as file:
        return list(file.keys())


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file with these tensors (data not needed), which then follow in this order.

    Eight bytes of length, then JSON, padded so that the data begin at a multiple of eight.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _places(path: Path) -> dict[str, _Place]:
    with _open(path):  # the library checks the header: lengths, offsets, overlaps
        pass
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if max(entry["shape"], default=0) > _LARGEST:  # of an empty tensor, whose bytes the library has no fault with
            raise InputError(f"{path} cannot be read as safetensors: {name} is of shape {entry['shape']}")
    return {
        name: _Place(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors; it may be truncated: {error}") from error
