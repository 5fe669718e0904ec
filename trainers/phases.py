"""Phases of a run, and what does not change while one lasts."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from adamerge.data import fetch
from modules import Blocks, Objective

#: What can learn: the names that `learn` takes.
PARTS = ("coefficients", "router", "correction", "heads")


@dataclass
class Phase:
    """Some of a run's steps, in which some parts learn by one objective.

    Attributes:
        objective: what these steps minimise.
        learn: the parts that learn: any of coefficients, router, correction, heads; default: all but the heads.
        share: fraction of the run's steps; the last phase takes what is left.
    """

    objective: Objective
    learn: list[str] | None = None
    share: float = 1.0


class Known:
    """Vectors by task and position in its data set, computed once, before the steps that look them up."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, str], tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, what: str, task: str, index: Tensor) -> list[Tensor] | None:
        """The rows of `what` at `index`; none where it is not known."""
        if (what, task) not in self._tables:
            return None
        place, rows = self._tables[what, task]
        at = place[index.to(place.device)]
        return [row[at] for row in rows]

    def has(self, what: str) -> bool:
        """Whether anything of this kind is known."""
        return any(kind == what for kind, _ in self._tables)

    @torch.no_grad()
    def fill(
        self,
        what: str,
        task: str,
        function: Callable[[Tensor], list[Tensor]],
        dataset: Dataset[tuple[Tensor, int]],
        index: Tensor,
        batch_size: int,
        device: torch.device,
    ) -> None:
        """Keep `function(images)`, tensors [B, ...], for the images at `index`, in batches in that order."""
        parts = [function(fetch(dataset, chunk)[0].to(device)) for chunk in index.split(batch_size)]
        place = torch.full((int(index.max()) + 1,), -1, dtype=torch.int64, device=device)
        place[index.to(device)] = torch.arange(len(index), device=device)
        self._tables[what, task] = place, [torch.cat(rows) for rows in zip(*parts, strict=True)]


class ExpertOutputs:
    """images -> [features, then with `blocks` the token means after every block], of the expert that is loaded."""

    def __init__(self, backbone: nn.Module, blocks: bool, device: torch.device) -> None:
        self.model = copy.deepcopy(backbone).eval().requires_grad_(False).to(device)
        self.hooks = Blocks(self.model) if blocks else None

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of another expert."""
        self.model.load_state_dict(dict(state))

    def __call__(self, images: Tensor) -> list[Tensor]:
        if self.hooks is None:
            return [self.model(images)]
        with self.hooks.recording() as recorded:
            features = self.model(images)
        return [features, *recorded.values()]
