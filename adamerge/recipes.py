"""Recipes: a merge described in a YAML file, and the job that it comes down to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adamerge.merge import Step
from adamerge.scales import Scale
from adamerge.task_vectors import TaskVectors


@dataclass(frozen=True)
class Job:
    """What is to be merged and written, whatever it was read from: nothing has been read but headers.

    Attributes:
        task_vectors: over files.
        rules: as `adamerge.merge` takes them.
        scale: as `adamerge.merge` takes it.
        exclude: patterns of tensors that stay the base's.
        dtype: of the merged floats; the base's if None.
        sources: folders or files that are read, by what they are ("base", an expert): a merge that is resumed must find
            them as they were.
        copy_from: the folder whose config, tokenizer and processor files go along; None for none.
        config: entries of config.json that the merge changes, `{"num_hidden_layers": 40}` say.
        recipe: what was asked for, as plain values: written beside the merge, and compared when one is resumed.
        notes: sentences that the user should read before the merge.
        shard_size: bytes of a file of weights, at most (one tensor may be larger).
    """

    task_vectors: TaskVectors
    rules: tuple[Step, ...]
    scale: Scale = 1.0
    exclude: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    sources: Mapping[str, Path] = field(default_factory=dict)
    copy_from: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    shard_size: int = 5 * 10**9
