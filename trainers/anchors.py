"""Functional dual anchors of a suite's experts, made once and kept in the user's cache folder."""

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge import TaskVectors
from adamerge.anchors import find_anchors
from adamerge.files import cache_folder, replacing
from modules import DualAnchors, LoneBlocks
from trainers.seeding import generator
from trainers.settings import settings

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation

log = logging.getLogger(__name__)


def anchor_rows(run: "Adaptation", objective: DualAnchors) -> Iterator[tuple[str, list[Tensor]]]:
    """By task, for one residual block after another: anchors [N, ...] and what the expert's block makes of them.

    Of images, the size alone is known.
    """
    vectors = run.suite.task_vectors()
    size = run.suite.dataset(run.suite.tasks[0], "test")[0][0].shape
    blocks = run.merged.set_apart(torch.zeros(1, *size, device=run.device))
    base = {name: value.to(run.device) for name, value in vectors.base.items()}
    for task in run.suite.tasks:
        expert = {name: value.to(run.device) for name, value in vectors.expert(task).items()}
        found = _anchors(blocks, vectors, task, objective, base, expert)
        with torch.no_grad():
            pairs = [(found[name], blocks(name, expert, found[name])) for name in blocks.shapes]
        yield task, [row for pair in pairs for row in pair]


def _anchors(
    blocks: LoneBlocks,
    vectors: TaskVectors,
    task: str,
    objective: DualAnchors,
    base: dict[str, Tensor],
    expert: dict[str, Tensor],
) -> dict[str, Tensor]:
    path = _file(blocks, vectors, task, objective)
    device = next(iter(base.values())).device
    if path.is_file():
        return load_file(path, str(device))
    found, cosines = {}, []
    for name, shape in blocks.shapes.items():
        start = torch.randn(objective.count, *shape, generator=generator(objective.seed, task, name))
        theta, tuned = ({key: state[key] for key in base if key.startswith(f"{name}.")} for state in (base, expert))
        start = (objective.scale * start).to(next(iter(theta.values())))
        result = find_anchors(partial(blocks, name), theta, tuned, start, objective.steps, objective.lr)
        found[name] = result.inputs.contiguous()
        cosines.append((result.before, result.after))
    before, after = (sum(values) / len(cosines) for values in zip(*cosines, strict=True))
    log.info(
        "Anchors of %s: the cosine of their gradient and the task vector rose from %.2f to %.2f", task, before, after
    )
    with replacing(path) as temporary:
        save_file(found, temporary)
    return found


def _file(blocks: LoneBlocks, vectors: TaskVectors, task: str, objective: DualAnchors) -> Path:
    """Where they are kept: named by the models, the blocks and the settings."""
    prints = vectors.fingerprints
    shapes = {name: [str(blocks.modules[name]), *shape] for name, shape in blocks.shapes.items()}
    key = json.dumps([prints["base"], prints[task], shapes, task, settings(objective)])
    return cache_folder() / "anchors" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
