"""Statistics of a suite's experts on the images of their tasks."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from adamerge.agreement import with_agreement
from adamerge.batches import Targets
from adamerge.data import fetch
from adamerge.errors import InputError
from adamerge.fingerprint import BASE, update
from adamerge.merge import Step
from adamerge.observing import Measure
from adamerge.relay import collect_through
from adamerge.rules import FwMerging, Merged, RegMeanPlusPlus
from adamerge.rules.random import generator
from adamerge.selecting import select
from adamerge.statistics import Informed, Statistics, collect
from adamerge.suites.base import Split, Suite

AnyStep = TypeVar("AnyStep", bound=Step)

#: Images that go through a model at a time.
BATCH = 64
#: Images of each task that statistics are measured on, as in most publications.
EXAMPLES = 256


def collect_suite(
    suite: Suite,
    measures: Sequence[Measure] = ("gram",),
    targets: Targets = "sampled",
    of_base: bool = False,
    examples: int = EXAMPLES,
    split: Split = "train",
    seed: int = 0,
) -> Statistics:
    """Measure every expert of a suite on images of its task, drawn at random; kept in the user's cache folder.

    Labels are used for targets="labels" alone. See `adamerge.statistics.collect`.

    Args:
        suite: prepared.
        measures: what is wanted.
        targets: the classes whose log-likelihood is differentiated, by the task's head.
        of_base: measure the base instead, on the images of all tasks.
        examples: per task, or all that there are.
        split: where they come from.
        seed: of the images and classes that are drawn.

    Raises:
        InputError: for an expert of which the suite has no task, and so no images.
    """
    parts = _parts(suite, split, examples, seed, targets == "labels")
    base, experts = suite.states()
    if of_base:
        chained = lambda: (batch for part in parts for batch in part.batches())  # noqa: E731
        key = ",".join(part.fingerprint() for part in parts)
        return collect(suite.backbone(), {BASE: base}, {BASE: chained}, measures, seed=seed, data={BASE: key})
    return collect(
        suite.backbone(),
        experts,
        {part.task: part.batches for part in parts},
        measures,
        targets,
        {part.task: suite.head(part.task).logits for part in parts},
        seed,
        {part.task: part.fingerprint() for part in parts},
    )


def informed(steps: Sequence[AnyStep], suite: Suite, labels: bool = False) -> list[AnyStep]:
    """The same transforms, rules and corrections; those that have no statistics yet get those of the suite.

    Args:
        steps: of a merge; not changed.
        suite: see `collect_suite`.
        labels: whether labels may be used.

    Raises:
        InputError: for a rule that needs labels, where they may not be used.
    """
    return [_informed(step, suite, labels) for step in steps]


def told(steps: Sequence[Step]) -> set[str]:
    """What steps are told that are still to be informed: training data, and its labels where a rule needs them."""
    known = set[str]()
    for step in steps:
        if isinstance(step, Merged):
            known |= told(step.rules)
        elif isinstance(step, Informed) and step.statistics is None:
            known |= {"train data", "labels"} if step.labelled else {"train data"}
    return known


def _informed(step: AnyStep, suite: Suite, labels: bool) -> AnyStep:
    if isinstance(step, Merged):
        return cast(AnyStep, Merged(informed(step.rules, suite, labels)))
    if not isinstance(step, Informed) or step.statistics is not None:
        return step
    if step.labelled and not labels:
        raise InputError(f"{type(step).__name__} needs labels: allow them, or give it statistics")
    step = copy.copy(step)
    if isinstance(step, RegMeanPlusPlus):
        batches = {part.task: part.batches for part in _parts(suite)}
        step.statistics = collect_through(suite.backbone(), suite.task_vectors(), batches, step)
        return step
    if isinstance(step, FwMerging):
        tasks = [_Part(suite, task, labels=True) for task in suite.tasks]
        batches, logits = {part.task: part.batches for part in tasks}, {part.task: part.head.logits for part in tasks}
        step.statistics = select(suite.backbone(), suite.task_vectors(), batches, step, logits)
        return step
    measures = [measure for measure in step.measures if measure != "agreement"]
    step.statistics = collect_suite(suite, measures, "labels" if step.labelled else "sampled", step.of_base)
    if "agreement" in step.measures:
        parts, (_, experts) = _parts(suite), suite.states()
        batches, logits = {p.task: p.batches for p in parts}, {p.task: p.head.logits for p in parts}
        step.statistics = with_agreement(step.statistics, suite.backbone(), experts, batches, logits)
    return step


def _parts(
    suite: Suite, split: Split = "train", examples: int = EXAMPLES, seed: int = 0, labels: bool = False
) -> list["_Part"]:
    if strangers := [name for name in suite.experts if name not in suite.tasks]:
        raise InputError(f"suite {suite.name} has no images for its expert {strangers[0]!r}: no task has that name")
    return [_Part(suite, task, split, examples, seed, labels) for task in suite.experts]


class _Part:
    """Some images of one task, the same for the same arguments."""

    def __init__(
        self,
        suite: Suite,
        task: str,
        split: Split = "train",
        examples: int = EXAMPLES,
        seed: int = 0,
        labels: bool = False,
    ) -> None:
        self.task, self.head, self.labels, self.images = task, suite.head(task), labels, suite.dataset(task, split)
        order = torch.randperm(len(self.images), generator=generator(seed, task, "statistics"))  # type: ignore[arg-type]
        self.indices = order[:examples]

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        for part in self.indices.split(BATCH):
            images, labels = fetch(self.images, part)
            yield (images, labels) if self.labels else (images,)

    def fingerprint(self) -> str:
        """SHA-256 of the images, the labels that are used, and the head that makes logits of their features."""
        head, digest = self.head, hashlib.sha256()
        update(digest, "head", head.weight)
        update(digest, f"{head.normalize} {head.scale}", torch.empty(0) if head.bias is None else head.bias)
        for batch in self.batches():
            for tensor in batch:
                update(digest, "images and labels", tensor)
        return digest.hexdigest()
