"""How far experts agree with each other on each other's data."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamerge.batches import Logits, call, each, output_logits, wide
from adamerge.errors import InputError
from adamerge.statistics import Statistics, load


@torch.no_grad()
def with_agreement(
    statistics: Statistics,
    model: nn.Module,
    experts: Mapping[str, Mapping[str, Tensor]],
    batches: Mapping[str, Callable[[], Iterable[Any]]],
    logits: Logits | Mapping[str, Logits] = output_logits,
) -> Statistics:
    """The statistics, and with them the "agreement" of every expert k with every expert j on the data of j.

    It is the mean cosine of their logits (of the head of j) over examples, 1 for j itself. Each pair of expert and
    data takes one pass; the logits of one expert for its own data are held. Arguments as for
    `adamerge.statistics.collect`.

    Raises:
        InputError: for an expert without batches, or one that does not fit the model.
    """
    if missing := [task for task in experts if task not in batches]:
        raise InputError(f"no data for expert {missing[0]!r}: there are batches for {', '.join(batches) or 'none'}")
    model = copy.deepcopy(model).eval()
    found: dict[str, dict[str, Tensor]] = {task: {} for task in experts}
    for judge in experts:
        finds = logits[judge] if isinstance(logits, Mapping) else logits

        def answers(task: str, judge: str = judge, finds: Logits = finds) -> Tensor:
            load(model, experts[task], task)
            device = next(model.parameters()).device
            outputs = [call(model, each(batch, lambda tensor: tensor.to(device))) for batch in batches[judge]()]
            return torch.cat([wide(finds(output)).flatten(1) for output in outputs])

        own = answers(judge)
        for task in experts:
            cosines = F.cosine_similarity(answers(task), own) if task != judge else own.new_ones(1)
            found[task][f"agreement/{judge}"] = cosines.mean()
    return Statistics(
        {task: replace(each, tensors={**each.tensors, **found[task]}) for task, each in statistics.observations.items()}
    )
