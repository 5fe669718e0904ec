"""What a merge is going to do, said before a byte of weights is read."""

import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.differences import PIECE
from adamerge.errors import InputError
from adamerge.files import json_file
from adamerge.fused import Thirds
from adamerge.kinds import kind, role
from adamerge.merge import stages
from adamerge.recipes import Job
from adamerge.rules.base import Changes, Correction, PerTensor, Rule
from adamerge.running import check_output, outcome
from adamerge.scales import matching, per_tensor
from adamerge.statistics import Informed
from adamerge.threads import WORKERS

#: What Python, torch and the libraries take by themselves, with samples and counters of thresholds, about.
_PROGRAM = 850 * 10**6


def report(job: Job, output: Path | None = None) -> RenderableType:
    """The job in words and numbers.

    Raises:
        InputError: for rules, scales and patterns that make no sense for these models, for an output folder that holds
            something already, and for a disk with less space than the merge takes.
    """
    vectors = job.task_vectors
    rule = stages(job.rules)[1]
    rule.check(vectors.tasks)
    merged = _merged(job)
    _fit_what_reads_nothing(job, merged)
    per_tensor(job.scale, Thirds(vectors.base).split(merged) if job.split_fused_qkv else merged)
    written = sum(tensor.nbytes for tensor in outcome(job).values())
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, words in _rows(job, merged, written):
        table.add_row(label, words)
    if output is not None:
        check_output(output)
        table.add_row("disk", _disk(output, written))
    return Group(table, *(Text(f"note: {note}") for note in job.notes))


def passes(job: Job) -> int:
    """How often the rules read all tensors before the one time in which they merge."""
    return sum(_fits(step) for step in job.rules)


def _fit_what_reads_nothing(job: Job, merged: list[str]) -> None:
    """Raise now what steps would raise that look at names, shapes and experts alone, and at what they are given."""
    vectors = job.task_vectors
    for step in job.rules:
        if isinstance(step, Informed):
            step.check(vectors.tasks)
            step.examine(vectors, weights=False)
    vectors = vectors.without(set(vectors.deltas) - set(merged))
    changes = Changes(tuple(merged), vectors.tasks, lambda: iter(()))
    for step in job.rules:
        if getattr(step, "passes", None) == 0:
            cast(Any, step).fit(changes if isinstance(step, Correction) else vectors)


def _rows(job: Job, merged: list[str], written: int) -> Iterable[tuple[str, str]]:
    vectors, base = job.task_vectors, job.task_vectors.base
    likes = {name: meta(base, name) for name in base}
    yield "models", f"base, {', '.join(vectors.tasks)}"
    elements = sum(like.numel() for like in likes.values())
    yield "tensors", f"{len(likes)} with {elements:,} parameters, {_dtypes(likes.values())}"
    kinds = Counter(kind(name, likes[name]) if name in merged else "kept" for name in likes)
    words = {"parameter": "merged", "statistics": "averaged over the experts", "kept": "copied from the base"}
    yield "of these", ", ".join(f"{count} {words[which]}" for which, count in kinds.items())
    if tied := _tied(job):
        yield "tied", tied
    if rows := {likes[name].shape[0] for name in likes if role(name) == "embedding"}:
        yield "vocabulary", ", ".join(f"{count} rows" for count in sorted(rows))
    yield "rules", ", ".join(type(step).__name__ for step in job.rules)
    reads, each = passes(job) + 1, decimal(sum(like.nbytes for like in likes.values()) * (len(vectors.tasks) + 1))
    yield "reads", f"{reads} × {each}" if reads > 1 else each
    yield "writes", decimal(written)
    yield "memory", f"about {decimal(memory(job))}"


def _merged(job: Job) -> list[str]:
    """The tensors that are merged, or averaged."""
    names = list(job.task_vectors.base)
    excluded = {name for pattern in job.exclude for name in matching(pattern, names)}
    return [name for name in job.task_vectors.deltas if name not in excluded]


def _fits(step: object) -> int:
    """How often a step reads all tensors: said by itself, or once if it has something to fit."""
    if (said := getattr(step, "passes", None)) is not None:
        return int(said)
    plain = (Rule.fit, PerTensor.fit, Correction.fit)
    return int(getattr(type(step), "fit", Rule.fit) not in plain)


def memory(job: Job) -> int:
    """Bytes at the peak, about: copies of all experts' share of a piece in each thread, or of the largest tensor."""
    largest = max((meta(job.task_vectors.base, name).numel() for name in _merged(job)), default=0)
    models = len(job.task_vectors.tasks) + 2
    if all(getattr(step, "elementwise", False) for step in job.rules):
        return _PROGRAM + 4 * models * min(PIECE, largest) * 4 * WORKERS
    return _PROGRAM + 2 * models * largest * 4


def _disk(output: Path, written: int) -> str:
    """Space needed and free; raises InputError where it does not do."""
    output = output.resolve()
    place = next(folder for folder in output.parents if folder.exists())
    partial = output.parent / f".{output.name}.partial"
    there = sum(file.stat().st_size for file in partial.iterdir()) if partial.is_dir() else 0
    free = shutil.disk_usage(place).free
    if written - there > free:
        raise InputError(f"the merge takes {decimal(written - there)} and {place} has {decimal(free)} left: make room")
    return f"{decimal(free)} free"


def _tied(job: Job) -> str:
    if job.task_vectors.tied:
        return ", ".join(f"{alias} to {name}" for alias, name in job.task_vectors.tied.items())
    config = json_file(job.copy_from / "config.json") if job.copy_from else None
    return "the head to the embedding" if isinstance(config, dict) and config.get("tie_word_embeddings") else ""


def _dtypes(likes: Iterable[Tensor]) -> str:
    counts = Counter(str(like.dtype).removeprefix("torch.") for like in likes)
    return ", ".join(dtype for dtype, _ in counts.most_common())
