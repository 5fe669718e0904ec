"""SHA-256 fingerprints of state dicts: the same tensors give the same digest, whatever file held them."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

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
