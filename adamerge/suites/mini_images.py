"""Pictures of suite Mini, drawn once and kept in the user's cache folder: drawing them takes longer than reading."""

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adamerge.errors import InputError
from adamerge.files import cache_folder, replacing
from adamerge.suites.mini_tasks import VERSION, MiniTask, Split

_LIBRARIES = ("numpy", "pillow", "matplotlib")  # the random numbers, the brushes and the fonts


def drawn(task: MiniTask, split: Split, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What `task.draw(split, count, seed)` draws, bit for bit; drawn anew where no file can be kept or read."""
    versions = [VERSION, *map(version, _LIBRARIES)]
    key = json.dumps([versions, task.name, task.classes, task.fog, split, count, seed])
    path = cache_folder() / "mini_images" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    with suppress(OSError, SafetensorError):
        kept = load_file(path)
        return kept["images"].numpy(), kept["labels"].numpy()
    images, labels = task.draw(split, count, seed)
    with suppress(OSError, InputError), replacing(path) as unfinished:
        save_file({"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}, unfinished)
    return images, labels
