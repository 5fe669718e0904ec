"""Random numbers that belong to one tensor of one expert."""

import hashlib
import json

import torch


def generator(seed: int, task: str, name: str) -> torch.Generator:
    """A generator for tensor `name` of the expert `task`, always on the CPU.

    It is seeded with the first 8 bytes of the SHA-256 of the three arguments, so that neither the order in which
    tensors are read nor the number of other experts nor the device changes what is drawn.
    """
    digest = hashlib.sha256(json.dumps([seed, task, name]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
