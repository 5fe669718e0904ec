"""Random numbers that depend on nothing but a key, such as (seed, step)."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def generator(*key: object) -> torch.Generator:
    """A random generator that depends on nothing but its key."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def drawing(device: torch.device, *key: object) -> Iterator[None]:
    """Within the block, torch's random numbers (dropout) depend on nothing but a key."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # torch.manual_seed would also note, with a traceback each, seeds for kinds of devices that are not there
        (torch.default_generator if device.type == "cpu" else torch).manual_seed(generator(*key).initial_seed())
        yield
