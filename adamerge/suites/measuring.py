"""Statistics of a suite's experts on the images of their tasks."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from adamerge.batches import Targets
from adamerge.data import fetch
from adamerge.errors import InputError
from adamerge.observing import Measure
from adamerge.rules.random import generator
from adamerge.statistics import Statistics, collect
from adamerge.suites.base import Split, Suite

#: Images that go through a model at a time.
BATCH = 64


def collect_suite(
    suite: Suite,
    measures: Sequence[Measure] = ("gram",),
    targets: Targets = "sampled",
    examples: int = 256,
    split: Split = "train",
    seed: int = 0,
) -> Statistics:
    """Measure every expert of a suite on images of its task, drawn at random; kept in the user's cache folder.

    Labels are used for targets="labels" alone. See `adamerge.statistics.collect`.

    Args:
        suite: prepared.
        measures: what is wanted.
        targets: the classes whose log-likelihood is differentiated, by the task's head.
        examples: per task, or all that there are.
        split: where they come from.
        seed: of the images and classes that are drawn.

    Raises:
        InputError: for an expert of which the suite has no task, and so no images.
    """
    if strangers := [name for name in suite.experts if name not in suite.tasks]:
        raise InputError(f"suite {suite.name} has no images for its expert {strangers[0]!r}: no task has that name")
    _, experts = suite.states()
    chosen = {task: _draw(suite, task, split, examples, seed) for task in suite.experts}
    return collect(
        suite.backbone(),
        experts,
        {task: partial(_batches, suite, task, split, indices) for task, indices in chosen.items()},
        measures,
        targets,
        {task: suite.head(task).logits for task in suite.experts},
        seed,
        {task: _fingerprint(suite, task, split, indices) for task, indices in chosen.items()},
    )


def _draw(suite: Suite, task: str, split: Split, examples: int, seed: int) -> Tensor:
    count = len(suite.dataset(task, split))  # type: ignore[arg-type]
    return torch.randperm(count, generator=generator(seed, task, "statistics"))[:examples]


def _batches(suite: Suite, task: str, split: Split, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part in indices.split(BATCH):
        yield fetch(suite.dataset(task, split), part)


def _fingerprint(suite: Suite, task: str, split: Split, indices: Tensor) -> str:
    """SHA-256 of the images and of the head that makes logits of their features."""
    head = suite.head(task)
    digest = hashlib.sha256(repr((head.normalize, head.scale)).encode())
    for tensor in (head.weight, *(() if head.bias is None else (head.bias,))):
        digest.update(tensor.contiguous().numpy().tobytes())
    for images, labels in _batches(suite, task, split, indices):
        digest.update(images.contiguous().numpy().tobytes())
        digest.update(labels.contiguous().numpy().tobytes())
    return digest.hexdigest()
