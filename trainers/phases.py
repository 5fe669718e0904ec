"""Phases of a run, and what does not change while one lasts."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge import InputError
from adamerge.data import fetch
from adamerge.fingerprint import BASE
from adamerge.suites import Suite
from modules import Blocks, DualAnchors, Head, Objective
from trainers.anchors import anchor_rows
from trainers.programs import Joint, Program
from trainers.streams import Stream

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation

#: What can learn: the names that `learn` takes.
PARTS = ("coefficients", "elements", "router", "correction", "heads")


@dataclass
class Phase:
    """Some of a run's steps, in which some parts learn by one objective.

    Attributes:
        objective: what these steps minimise.
        learn: the parts that learn: any of coefficients, elements, router, correction, heads; default: all but the
            heads.
        share: fraction of the run's steps; the last phase takes what is left.
        program: what a step does with its batch; default: all tasks' losses at once.
    """

    objective: Objective
    learn: list[str] | None = None
    share: float = 1.0
    program: Program | None = None

    @cached_property
    def stepper(self) -> Program:
        """What turns batches into steps."""
        return self.program or Joint()

    def learning(self, parts: Sequence[str]) -> list[str]:
        """The parts that learn, of those that a run has. Raises InputError for others."""
        if self.learn is None:
            return [part for part in parts if part != "heads"]
        if not self.learn:
            raise InputError(f"learn is empty: name some of {', '.join(parts)}")
        for part in self.learn:
            if part not in parts:
                why = f"this run has no {part}" if part in PARTS else f"parts are {', '.join(PARTS)}"
                raise InputError(f"{part!r} cannot learn: {why}")
        return self.learn


def boundaries(phases: Sequence[Phase], steps: int) -> list[int]:
    """The step at which each phase of a run ends."""
    done = [sum(phase.share for phase in phases[:number]) for number in range(1, len(phases))]
    return [*(round(share * steps) for share in done), steps]


def asks_router(objective: Objective) -> bool:
    """Whether an objective, or a part of it, is about the task that the router takes an image to be of."""
    return any(isinstance(part, Objective) and part.router_only for part in objective.modules())


class Known:
    """Vectors by task and position in its data set, computed once, before the steps that look them up."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, str], tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, what: str, task: str, part: Mapping[str, Tensor] | None) -> list[Tensor] | None:
        """The rows of `what` at the part's `index` (of `None`: all); none where it is not known."""
        if (what, task) not in self._tables or (part is not None and "index" not in part):
            return None
        place, rows = self._tables[what, task]
        if part is None:
            return rows
        at = place[part["index"].to(place.device)]
        return [row[at] for row in rows]

    def has(self, what: str) -> bool:
        """Whether anything of this kind is known."""
        return any(kind == what for kind, _ in self._tables)

    def keep(self, what: str, task: str, rows: list[Tensor]) -> None:
        """Keep these rows, which are of no image."""
        self._tables[what, task] = torch.arange(len(rows[0])), rows

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
        if not len(index):  # a task that has no turn in these steps
            return
        parts = [function(fetch(dataset, chunk)[0].to(device)) for chunk in index.split(batch_size)]
        place = torch.full((int(index.max()) + 1,), -1, dtype=torch.int64, device=device)
        place[index.to(device)] = torch.arange(len(index), device=device)
        self._tables[what, task] = place, [torch.cat(rows) for rows in zip(*parts, strict=True)]


class ExpertOutputs:
    """What a suite's experts give for images, one expert in memory at a time."""

    def __init__(self, suite: Suite, blocks: bool, device: torch.device) -> None:
        self.suite, self.vectors = suite, suite.task_vectors()
        self.model = copy.deepcopy(suite.backbone()).eval().requires_grad_(False).to(device)
        self.hooks = Blocks(self.model) if blocks else None
        self._loaded: str | None = None

    @torch.no_grad()
    def __call__(self, expert: str, images: Tensor) -> list[Tensor]:
        """Features, then with `blocks` the token means after every block, of that expert, or of the base (`BASE`)."""
        if expert != self._loaded:
            self.model.load_state_dict(dict(self.vectors.base if expert == BASE else self.vectors.expert(expert)))
            self._loaded = expert
        if self.hooks is None:
            return [self.model(images)]
        with self.hooks.recording() as recorded:
            features = self.model(images)
        return [features, *recorded.values()]

    @torch.no_grad()
    def logits(self, task: str, images: Tensor) -> Tensor:
        """Of the task's expert, by the head it came with."""
        logits: Tensor = Head(self.suite.head(task)).to(images.device)(self(task, images)[0])
        return logits


class Asked(Known):
    """What experts give for images that nobody knows beforehand: asked at each step."""

    def __init__(self, experts: ExpertOutputs) -> None:
        super().__init__()
        self.experts = experts

    def __call__(self, what: str, task: str, part: Mapping[str, Tensor] | None) -> list[Tensor] | None:
        if what != "expert" or part is None:
            return super().__call__(what, task, part)
        return self.experts(task, part["images"])


def look_ahead(run: "Adaptation", steps: range, same: str | None) -> None:
    """Let a run know, once per image that these steps take, what does not change during its phase.

    That is what the experts give, where the objective asks for it, and `same`: the features of the "merged" model or of
    the "shared" expert. Of images that are of no `Stream` nothing is known ahead: experts are asked as they come.
    """
    stream, objective = run.trainer.datamodule, run.phase.objective  # type: ignore[attr-defined]
    teaches = "teacher" in objective.needs
    if teaches:
        experts = ExpertOutputs(run.suite, objective.blocks, run.device)
        for task in run.suite.tasks:
            run.teachers[task].to(run.device)
    if not isinstance(stream, Stream):
        run.known = Asked(experts) if teaches else run.known
        return
    batches, per_step = stream.steps(), run.trainer.accumulate_grad_batches

    def keep(what: str, task: str, outputs: Callable[[Tensor], list[Tensor]]) -> None:
        index = batches.all_indices(task, steps.start, steps.stop, per_step)
        with run.trainer.precision_plugin.forward_context():
            run.known.fill(what, task, outputs, batches.datasets[task], index, stream.eval_batch_size, run.device)

    def features(task: str, images: Tensor) -> list[Tensor]:
        return [run.view(task, {"images": images}).raw if same == "merged" else run.merged.shared(images)]

    if same is not None:
        for task in batches.datasets:
            keep(same, task, partial(features, task))
    if teaches:
        for task in batches.datasets:
            keep("expert", task, partial(experts, task))
    for part in objective.modules():
        if isinstance(part, DualAnchors):
            for task, rows in anchor_rows(run, part):
                run.known.keep("anchors", task, rows)
