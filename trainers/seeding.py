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
        seed = generator(*key).initial_seed()
        # On a CPU, its generator alone: torch's own function also notes who asked, for devices that are not in use.
        torch.default_generator.manual_seed(seed) if device.type == "cpu" else torch.manual_seed(seed)
        yield
