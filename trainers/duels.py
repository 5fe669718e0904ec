"""Which of two snapshots of a run is the better one, by images that have come and no label."""

import math
from collections.abc import Mapping
from typing import cast

import lightning as L
import torch
from torch import Tensor

from adamerge.data import fetch
from adamerge.watching import evaluating
from trainers.adaptation import Adaptation
from trainers.finding import regrouped
from trainers.phases import ExpertOutputs
from trainers.seeding import generator
from trainers.streams import Stream

State = Mapping[str, Tensor]


def blind(trainer: L.Trainer) -> bool:
    """Whether nobody knows beforehand which images come, or of which tasks they are."""
    stream = trainer.datamodule  # type: ignore[attr-defined]
    return isinstance(stream, Stream) and (stream.order is not None or not stream.task_known)


@torch.no_grad()
def duel(
    trainer: L.Trainer, run: Adaptation, first: State, second: State, images: int, ask: bool
) -> tuple[float, float]:
    """By how much the second of two snapshots is better, and the standard error of that if neither were.

    That is the mean over tasks of agreement with the experts or of information on the class, 1/B Σ_b KL(p_b ‖ p̄) /
    log C, image by image. Both see the same images, up to `images` of each task that came; those of unknown tasks count
    for the task that the first snapshot takes them to be of, and for agreement the second has to find that task, too.
    The run is left with the second.
    """
    run.load_state_dict(first)
    with evaluating(run), trainer.precision_plugin.forward_context():
        parts = _come(trainer, run, images)
        experts = _ask(run, parts) if ask else {}
        values = []
        for state in (first, second):
            run.load_state_dict(state)
            values.append([_values(run, part, task, experts.get(task)) for task, part in parts.items()])
    gains = [new - old for old, new in zip(*values, strict=True)]
    gain = torch.stack([each.mean() for each in gains]).mean()
    doubt = torch.stack([each.square().mean() / len(each) for each in gains]).sum().sqrt() / len(gains)
    both = cast(Tensor, trainer.strategy.reduce(torch.stack([gain, doubt]).to(run.device), reduce_op="mean"))
    return float(both[0]), float(both[1])


def _values(run: Adaptation, images: Tensor, task: str, expert: Tensor | None) -> Tensor:
    """[B] what each image adds to the criterion."""
    if expert is not None:
        return (run.scored(images, task).argmax(-1) == expert.argmax(-1)).double()
    p = run(images, task).double().softmax(-1)
    own = torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))
    return own.sum(-1).nan_to_num() / math.log(max(p.shape[-1], 2))


def _come(trainer: L.Trainer, run: Adaptation, images: int) -> dict[str, Tensor]:
    """Some of the images that came, by task, or by the task that is found."""
    stream: Stream = trainer.datamodule  # type: ignore[attr-defined]
    steps, per_step = stream.steps(), trainer.accumulate_grad_batches
    parts = {}
    for task, dataset in steps.datasets.items():
        came = steps.all_indices(task, 0, trainer.global_step, per_step)
        if len(came):
            rng = generator(stream.seed, "duel", task, trainer.global_step)
            count = images if stream.task_known else images * len(steps.datasets)
            index = came[torch.randperm(len(came), generator=rng)[:count]]
            parts[task] = fetch(dataset, index)[0].to(run.device)
        if not stream.task_known:  # every task has the images of all
            return _by_found_task(run, parts[task])
    return parts


def _by_found_task(run: Adaptation, images: Tensor) -> dict[str, Tensor]:
    found = torch.cat([run.identify(part) for part in images.split(250)])
    return {task: part["images"] for task, part in regrouped(run, {"": {"images": images}}, {"": found}).items()}


def _ask(run: Adaptation, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The experts' logits."""
    experts = ExpertOutputs(run.suite, False, run.device)
    return {task: experts.logits(task, images) for task, images in parts.items()}
