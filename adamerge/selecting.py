"""Shares of the experts that labelled examples select (FW-Merging)."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.batches import Likelihoods, Logits, call, each, masks_of, output_logits, size, wide
from adamerge.checkpoints import meta
from adamerge.errors import InputError
from adamerge.kinds import kind
from adamerge.observing import Observation
from adamerge.rules.combining import combined
from adamerge.rules.frank_wolfe import FwMerging
from adamerge.statistics import Statistics, load
from adamerge.task_vectors import TaskVectors


def select(
    model: nn.Module,
    task_vectors: TaskVectors,
    batches: Mapping[str, Callable[[], Iterable[Any]]],
    rule: FwMerging = FwMerging(),  # noqa: B008  nothing changes it
    logits: Logits | Mapping[str, Logits] = output_logits,
) -> Statistics:
    """The "share" λₖ of every expert in every tensor, for `adamerge.rules.FwMerging`.

    Each step merges, takes one pass over all examples for the gradient ∇L of the mean over tasks, and reads the task
    vectors once for ⟨∇L, τₖ⟩.

    Args:
        model: of the experts' architecture, on the device to work on; a copy is used.
        task_vectors: base and experts.
        batches: by task, a function that gives its labelled batches, again and again. Tasks need no expert, and
            experts no task.
        rule: whose steps these are.
        logits: finds them in the model's output; one for all tasks, or one for each.

    Raises:
        InputError: without tasks or examples, without labels, and for a model that does not fit.
    """
    if not batches:
        raise InputError("no task was given: there is no loss to select experts by")
    tasks = task_vectors.tasks
    names = [n for n in task_vectors.deltas if kind(n, meta(task_vectors.base, n)) == "parameter"]
    shares = {name: torch.full((len(tasks),), 1 / len(tasks), dtype=torch.float64) for name in names}
    model = copy.deepcopy(model).eval().requires_grad_()
    for step in range(rule.steps):
        rule = copy.copy(rule)
        rule.statistics = _statistics(tasks, shares)
        load(model, combined(task_vectors, rule, 1.0), "merge of the experts")
        slopes = _slopes(_gradient(model, batches, logits), task_vectors, names)
        if rule.per == "model":
            slopes = dict.fromkeys(names, torch.stack(list(slopes.values())).sum(0))
        shares = {name: toward_best(share, slopes[name], 2 / (step + 2)) for name, share in shares.items()}
    return _statistics(tasks, shares)


def toward_best(share: Tensor, slopes: Tensor, gamma: float) -> Tensor:
    """(1 − γ) λ + γ e_s, s the smallest of the slopes [K]; λ where ⟨slopes, e_s − λ⟩ ≥ 0."""
    way = torch.zeros_like(share).index_fill_(0, slopes.argmin(), 1.0) - share
    return share + gamma * way if bool(slopes @ way < 0) else share


def _statistics(tasks: tuple[str, ...], shares: Mapping[str, Tensor]) -> Statistics:
    by_task = {task: {f"share/{name}": s[k].clone() for name, s in shares.items()} for k, task in enumerate(tasks)}
    return Statistics({task: Observation(found) for task, found in by_task.items()})


def _gradient(
    model: nn.Module, batches: Mapping[str, Callable[[], Iterable[Any]]], logits: Logits | Mapping[str, Logits]
) -> dict[str, Tensor]:
    """∇L of the mean over tasks of the mean cross-entropy; parameters without a gradient are left out."""
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    total: dict[str, Tensor] = {}
    for task, given in batches.items():
        finds = logits[task] if isinstance(logits, Mapping) else logits
        likelihoods = Likelihoods("labels", finds, torch.Generator())
        own: dict[str, Tensor] = {}
        count = 0
        for batch in given():
            count += size(batch)
            batch = each(batch, lambda tensor: tensor.to(device))
            with torch.enable_grad():
                (objective,) = likelihoods(call(model, batch), batch, masks_of(batch))
                gradients = torch.autograd.grad(-objective, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    own[name] = own[name] + wide(gradient) if name in own else wide(gradient)
        if not count:
            raise InputError(f"task {task!r} has no example: there is no loss to select experts by")
        for name, gradient in own.items():
            part = gradient / (count * len(batches))
            total[name] = total[name] + part if name in total else part
    return total


@torch.no_grad()
def _slopes(gradient: Mapping[str, Tensor], task_vectors: TaskVectors, names: Iterable[str]) -> dict[str, Tensor]:
    """⟨∇L, τₖ⟩ [K] of every tensor; 0 where there is no gradient."""
    by_name = {task_vectors.tied.get(name, name): value for name, value in gradient.items()}
    found = {}
    for name in names:
        deltas = task_vectors.deltas[name]
        slope = by_name.get(name)
        products = [0.0 if slope is None else float((slope.to(delta) * delta).sum()) for delta in deltas]
        found[name] = torch.tensor(products, dtype=torch.float64)
    return found
