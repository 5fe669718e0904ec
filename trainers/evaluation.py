"""Scoring models on a suite, and the reference rows that every result is compared with."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MeanMetric

from adamerge import merge
from adamerge.data import fetch, labels_of
from adamerge.files import cache_folder, write_text
from adamerge.fingerprint import fingerprint
from adamerge.rules import Mean, TaskArithmetic
from adamerge.suites import Suite
from modules import Head
from trainers.loaders import EvalChunks, StepLoader

log = logging.getLogger(__name__)

#: Marks a row whose setting was chosen by the labels it is scored with.
ORACLE = "oracle"

#: Of the reference rows that are kept: count up when what they say changes, in numbers or in names.
_VERSION = 2

#: Accuracy in [0, 1] by task.
Accuracy = dict[str, float]


@torch.no_grad()
def accuracy(
    logits: Callable[[Tensor, str], Tensor],
    datasets: Mapping[str, Dataset[Any]],
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> Accuracy:
    """Top-1 accuracy of each task, by `logits(images, task)`, over its whole data set.

    The function gives logits [B, C], or says itself what it got right, as booleans [B]. With `shard` = (rank,
    processes), every process takes its part and all get the result.
    """
    scores = {}
    for task, dataset in datasets.items():
        metric = MeanMetric(sync_on_compute=shard[1] > 1).to(device)
        chunks = EvalChunks(dataset, batch_size, shard)
        for images, labels in StepLoader(chunks, len(chunks), num_workers):
            if len(labels):  # the last chunk of a task may leave a process without images
                out = logits(images.to(device), task)
                hits = out if out.dtype == torch.bool else out.argmax(-1) == labels.to(device)
                metric.update(hits.float())
        scores[task] = metric.compute().item()
    return scores


def reference_rows(
    suite: Suite,
    datasets: Mapping[str, Dataset[Any]],
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    fingerprints: Mapping[str, str] | None = None,
    num_workers: int = 0,
    shard: tuple[int, int] = (0, 1),
) -> dict[str, Accuracy]:
    """Accuracy of the base, of each expert on its own task if it has one, of the mean and of task arithmetic.

    Task arithmetic is scored at 0.3 and over a grid; the grid's best is an oracle, since labels choose it. Rows are
    computed once per (models, heads, scored images, version) and kept in the user's cache folder; with the
    `fingerprints` of the models given, a second call does not even read them.
    """
    fingerprints = fingerprints or suite.task_vectors().fingerprints
    heads = {task: Head(suite.head(task)) for task in suite.tasks}
    cached = cache_folder() / "references" / f"{_key(fingerprints, suite.backbone(), heads, datasets)}.json"
    if cached.is_file():
        rows: dict[str, Accuracy] = json.loads(cached.read_text())
        return rows
    log.info("Scoring the base, the experts and static merges once for this suite (kept in %s)", cached.parent)
    task_vectors = suite.task_vectors()
    model = copy.deepcopy(suite.backbone()).eval().to(device)  # the suite may hand out the user's own
    on_device = {task: head.to(device) for task, head in heads.items()}

    def logits(images: Tensor, task: str) -> Tensor:
        return on_device[task](model(images))

    def score(state: Mapping[str, Tensor], tasks: tuple[str, ...] = suite.tasks) -> Accuracy:
        model.load_state_dict(dict(state))
        return accuracy(logits, {task: datasets[task] for task in tasks}, batch_size, device, num_workers, shard)

    grid = sorted({*(n / 10 for n in range(1, 11)), 1 / len(suite.experts)})
    arithmetic = {scale: score(merge(task_vectors, [TaskArithmetic()], scale)) for scale in grid}
    best = max(grid, key=lambda scale: average(arithmetic[scale]))
    taught = [task for task in suite.tasks if task in task_vectors.tasks]
    rows = {
        "base": score(task_vectors.base),
        **({"experts": {t: score(task_vectors.expert(t), (t,))[t] for t in taught}} if taught else {}),
        "mean": score(merge(task_vectors, [Mean()])),
        "task arithmetic 0.3": arithmetic[0.3],
        f"task arithmetic {best:.3g} ({ORACLE})": arithmetic[best],
    }
    if shard[0] == 0:
        write_text(cached, json.dumps(rows))
    return rows


def average(scores: Accuracy) -> float:
    """The mean over tasks."""
    return sum(scores.values()) / len(scores)


def _key(
    fingerprints: Mapping[str, str],
    backbone: nn.Module,
    heads: Mapping[str, Head],
    datasets: Mapping[str, Dataset[Any]],
) -> str:
    """What the rows depend on: this code, the models, how they compute, the heads, the labels, a spread of images."""
    digest = hashlib.sha256(json.dumps([_VERSION, dict(fingerprints)], sort_keys=True).encode())
    # Two networks may share tensors and differ in what they compute: number of attention heads, activation, ...
    parts = (f"{name}:{type(m).__name__}:{_plain(m)}" for name, m in backbone.named_modules())
    digest.update("|".join(parts).encode())
    for task, head in heads.items():
        dataset = datasets[task]
        count = len(dataset)  # type: ignore[arg-type]
        images, _ = fetch(dataset, torch.linspace(0, count - 1, min(count, 64)).long())
        labels = labels_of(dataset)
        state = {**head.state_dict(), "images": images.cpu(), "labels": labels}
        digest.update(f"{task}|{head.normalize}|{head.scale}|{fingerprint(state)}".encode())
    return digest.hexdigest()[:24]


def _plain(module: nn.Module) -> dict[str, Any]:
    """The numbers, words and switches among a module's own attributes."""
    return {k: v for k, v in sorted(vars(module).items()) if isinstance(v, (int, float, str)) and k != "training"}
