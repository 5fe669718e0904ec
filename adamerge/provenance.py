"""Whether statistics are those of the experts at hand: of their tensors, their shapes and their weights."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adamerge.batches import wide
from adamerge.checkpoints import meta
from adamerge.deltas import dense
from adamerge.errors import InputError
from adamerge.fingerprint import BASE
from adamerge.kinds import kind
from adamerge.observing import Measure, Observation
from adamerge.task_vectors import TaskVectors

if TYPE_CHECKING:
    from adamerge.statistics import Statistics

#: Weights this share of an expert's way apart are another's: two experts are further, rounding to bfloat16 is less.
_APART = 0.5
#: Of the weights' norm: so far apart are those that somebody has rounded to bfloat16 and back.
_ROUNDED = 2e-3


def signature(weight: Tensor) -> float:
    """uᵀ W v for normal u and v that are always the same ones: another for other weights, by about |W − W'|."""
    flat = wide(weight.detach()).cpu()
    flat = flat.flatten(1) if flat.dim() > 1 else flat.reshape(1, -1)
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=rng, dtype=torch.float64).to(flat.dtype) for size in flat.shape)
    return float(left @ flat @ right)


@torch.no_grad()
def examine(
    statistics: "Statistics",
    measures: Sequence[Measure],
    task_vectors: TaskVectors,
    of_base: bool,
    owner: str,
    weights: bool = True,
) -> None:
    """Raise InputError for statistics of another model or of other weights than these; `owner` is the rule's name.

    Weights are compared where the statistics know whose they are (`Observation.signatures`), and not at all where
    `weights` is False: names and shapes alone are looked at then.
    """
    likes = {name: meta(task_vectors.base, name) for name in task_vectors.deltas}
    names = [name for name, like in likes.items() if kind(name, like) == "parameter"]
    for task in (BASE,) if of_base else task_vectors.tasks:
        observation = statistics.observations[task]
        for measure in measures:
            if measure == "agreement":
                continue
            measured = [name for name in names if observation.has(measure, name)]
            if not measured:
                raise InputError(
                    f"{owner} has the {measure} of other tensors than these experts have: of {task!r}, for example, "
                    f"{_first(observation, measure)} was measured, and {names[0]} is here; collect them from this model"
                )
            for name in measured:
                _check_shape(observation, measure, name, likes[name].shape, task)
    if weights:
        _check_weights(statistics, names, task_vectors, of_base, owner)


def _first(observation: Observation, measure: Measure) -> str:
    return next(key for key in observation.tensors if key.startswith(f"{measure}/")).split("/", 1)[1]


def _check_shape(observation: Observation, measure: Measure, name: str, shape: torch.Size, task: str) -> None:
    if measure in ("gram", "merged_gram", "output_gram") and len(shape) != 2:
        return  # which such a rule averages
    ends = (*shape[:1], *shape[-1:])[:: -1 if observation.flipped(name) else 1]
    expected = {"fisher": shape, "sensitivity": (), "share": (), "magnitude": ends[-1:], "output_gram": ends[:1] * 2}
    found = meta(observation.tensors, observation.key(measure, name)).shape
    if found != torch.Size(expected.get(measure, ends[-1:] * 2)):
        wanted = list(expected.get(measure, ends[-1:] * 2))
        raise InputError(f"{name}: the {measure} of {task!r} has shape {list(found)}, expected {wanted}")


def _check_weights(
    statistics: "Statistics", names: Sequence[str], task_vectors: TaskVectors, of_base: bool, owner: str
) -> None:
    owners = (BASE,) if of_base else task_vectors.tasks
    known = {task: statistics.observations[task].signatures for task in owners}
    gaps: dict[str, dict[str, float]] = {task: {} for task in owners}
    near = dict.fromkeys(owners, 0.0)
    for name in names:
        if not any(name in signatures for signatures in known.values()):
            continue
        base, compressed = task_vectors.piece(name)
        deltas = dense(compressed)
        rounded = _ROUNDED * float(torch.linalg.vector_norm(wide(base)))
        for k, task in enumerate(owners):
            if name in known[task]:
                weights, way = (base, deltas) if of_base else (base + deltas[k], deltas[k])
                gaps[task][name] = (signature(weights) - known[task][name]) ** 2
                near[task] += (_APART * float(torch.linalg.vector_norm(way))) ** 2 + rounded**2
    for task, by_name in gaps.items():
        if sum(by_name.values()) > near[task]:
            raise InputError(
                f"{owner}: the statistics of {task!r} were measured on other weights than it has here, most of all in "
                f"{max(by_name, key=by_name.__getitem__)}: collect them from this model, or give the one they are of"
            )
