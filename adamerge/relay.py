"""Statistics measured block by block through the merge that they make (RegMean++)."""

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.errors import InputError
from adamerge.kinds import block_of
from adamerge.observing import Observation, observe
from adamerge.rules.combining import MergedState, combined
from adamerge.rules.linear import Mean
from adamerge.rules.regmean import RegMeanPlusPlus
from adamerge.statistics import Statistics, load, signatures
from adamerge.task_vectors import TaskVectors


@torch.no_grad()
def collect_through(
    model: nn.Module,
    task_vectors: TaskVectors,
    batches: Mapping[str, Callable[[], Iterable[Any]]],
    rule: RegMeanPlusPlus = RegMeanPlusPlus(),  # noqa: B008  nothing changes it
) -> Statistics:
    """The "merged_gram" of every expert, for `adamerge.rules.RegMeanPlusPlus`.

    Blocks go in the order in which the model runs them. For each, every expert's own block is put behind the blocks
    merged so far, its inputs are measured on the expert's data, and then the block is merged. What lies in no block
    with a linear layer (embeddings, convolutions) is the mean from the start. The model runs once for every block,
    expert and batch; one model and the Grams of all experts are held.

    Args:
        model: of the experts' architecture, on the device to work on; a copy is used.
        task_vectors: base and experts.
        batches: by expert, a function that gives its batches, again and again.
        rule: by which blocks are merged: the statistics are for one of the same arguments.

    Raises:
        InputError: for an expert without batches or a model that they do not fit, and as `observe`.
    """
    tasks = task_vectors.tasks
    if missing := [task for task in tasks if task not in batches]:
        raise InputError(f"no data for expert {missing[0]!r}: there are batches for {', '.join(batches) or 'none'}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    merged = combined(task_vectors, Mean(), 1.0)
    load(model, merged, "mean of the experts")
    first = observe(model, islice(batches[tasks[0]](), 1), ("magnitude",))
    layers = [name for key in first.tensors if (name := key.split("/", 1)[1]) in merged]
    blocks = block_of(merged)
    found: dict[str, Observation] = {task: Observation({}) for task in tasks}
    for block in dict.fromkeys(blocks[name] for name in layers):
        names = [name for name in task_vectors.deltas if blocks[name] == block]
        for k, task in enumerate(tasks):
            own = {name: _own(task_vectors, name, k) for name in names}
            load(model, merged | _tied(task_vectors, own), task)
            seen = observe(model, batches[task](), ("merged_gram",), layers=names)
            old = found[task]
            found[task] = Observation(
                {**old.tensors, **seen.tensors},
                {**old.shared, **seen.shared},
                old.transposed | seen.transposed,
                {**old.signatures, **signatures(seen, own)},
            )
        rule = copy.copy(rule)
        rule.statistics = Statistics(found)
        state = MergedState(task_vectors, task_vectors, rule)
        merged |= _tied(task_vectors, {name: state[name] for name in names})
    return Statistics(found)


def _own(task_vectors: TaskVectors, name: str, k: int) -> Tensor:
    base = task_vectors.base[name]
    return (base + task_vectors.deltas[name][k]).to(base.dtype)


def _tied(task_vectors: TaskVectors, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the other names of these tensors."""
    return tensors | {alias: tensors[name] for alias, name in task_vectors.tied.items() if name in tensors}
