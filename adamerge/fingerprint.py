"""SHA-256 fingerprints of state dicts: the same tensors give the same digest, whatever file held them."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch
from torch import Tensor

#: The base's name among the fingerprints.
BASE = "base"

#: Characters of a digest that are shown to people; comparisons use all 64.
SHORT = 12


def update(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    """Feed one named tensor to a running digest: its name, dtype, shape and bytes."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest.update(flat.numpy().data)


def fingerprint(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> str:
    """Hex SHA-256 over `names` (default: all) of a state dict, in sorted order, one tensor at a time."""
    digest = hashlib.sha256()
    for name in sorted(state if names is None else names):
        update(digest, name, state[name])
    return digest.hexdigest()


class Digests:
    """Running fingerprints of several states at once; hashing leaves the interpreter lock, so threads help."""

    def __init__(self, owners: tuple[str, ...]) -> None:
        self._owners = owners
        self._digests = [hashlib.sha256() for _ in owners]
        self._pool = ThreadPoolExecutor()

    def update(self, name: str, tensors: list[Tensor]) -> None:
        list(self._pool.map(update, self._digests, repeat(name), tensors))

    def hexdigests(self) -> dict[str, str]:
        self._pool.shutdown()
        return {owner: digest.hexdigest() for owner, digest in zip(self._owners, self._digests, strict=True)}
