"""What a step knows of each task's images: computed when an objective asks for it, and once."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from adamerge import InputError
from modules.corrections import Correction
from modules.heads import Heads
from modules.merged import MergedModel, Weights


class Known(Protocol):
    """Outputs that do not change while a phase lasts."""

    def __call__(self, what: str, task: str, part: Mapping[str, Tensor] | None) -> list[Tensor] | None:
        """The rows of `what` for a task's part of a batch (`None`: all there are); none where it is not known."""


class Teacher:
    """The expert's outputs for one task's images.

    Attributes:
        features: [B, D].
        blocks: token means [B, D_l] after every residual block.
        logits: [B, C], of the expert under the head it came with.
    """

    def __init__(self, head: nn.Module, features: Tensor, blocks: list[Tensor]) -> None:
        self._head, self.features, self.blocks = head, features, blocks

    @cached_property
    def logits(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._head(self.features)
        return logits


class Pass:
    """One forward pass over the images of one or more tasks, whose views share it."""

    def __init__(self, merged: MergedModel, images: Mapping[str, Tensor], blocks: bool = False) -> None:
        self.merged, self.images, self.record = merged, images, blocks
        self.sizes = {task: len(x) for task, x in images.items()}

    @cached_property
    def outputs(self) -> dict[str, list[Tensor]]:
        """By task, the features [B, D] and, if asked for, the token means after every block."""
        images = torch.cat(list(self.images.values()))
        with self.merged.of(self.sizes):
            if not self.record:
                return self._split([self._features(images)])
            with self.merged.blocks.recording() as blocks:
                features = self._features(images)
            return self._split([features, *blocks.values()])

    def _features(self, images: Tensor) -> Tensor:
        """The model's output; a router of features takes those of the shared expert that this pass has already."""
        merged = self.merged
        if merged.routing is None or merged.router is None or not merged.router.global_:
            return cast(Tensor, merged(images))
        return merged.routed(torch.cat([part[0] for part in self.shared.values()]), images)

    @cached_property
    def weights(self) -> Weights:
        """The merged weights."""
        return self.merged.current()

    @cached_property
    def shared(self) -> dict[str, list[Tensor]]:
        """By task, what a router of features looks at: the features of the shared expert, or of all experts."""
        return self._split([self.merged.shared(torch.cat(list(self.images.values())))])

    def _split(self, outputs: list[Tensor]) -> dict[str, list[Tensor]]:
        parts = [output.split(list(self.sizes.values())) for output in outputs]
        return {task: list(part) for task, part in zip(self.sizes, zip(*parts, strict=True), strict=True)}


class View:
    """One task's images as a step sees them. Objectives take from it what they need.

    Attributes:
        task: its name.
        number: the position of its expert among the task vectors.
        part: the task's part of the batch.
    """

    def __init__(
        self,
        task: str,
        part: Mapping[str, Tensor],
        passed: Pass,
        heads: Heads,
        correction: Correction | None = None,
        known: Known = lambda what, task, part: None,
        teachers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.task = task
        self.part, self._pass, self._heads, self._correction = part, passed, heads, correction
        self._known = known
        self._teachers: Mapping[str, nn.Module] = teachers or dict(heads.items())

    @property
    def size(self) -> int:
        """How many images there are."""
        return self._pass.sizes[self.task]

    @cached_property
    def number(self) -> int:
        experts = self._pass.merged.tasks
        if self.task not in experts:
            raise InputError(f"task {self.task!r} has no expert of its own among {', '.join(experts)}")
        return experts.index(self.task)

    @cached_property
    def raw(self) -> Tensor:
        """[B, D] features of the merged model before any correction."""
        known = self._look_up("merged")
        return self._pass.outputs[self.task][0] if known is None else known[0]

    @cached_property
    def features(self) -> Tensor:
        """[B, D] features, corrected."""
        return self.raw if self._correction is None else self._correction.features(self.raw, self.task)

    def taken_as(self, task: str) -> "View":
        """The same images, with the same raw features, taken to be of another task."""
        other = View(task, self.part, self._pass, self._heads, self._correction, self._known, self._teachers)
        other.raw = self.raw
        return other

    @property
    def blocks(self) -> list[Tensor]:
        """Token means [B, D_l] after every residual block."""
        return self._pass.outputs[self.task][1:]

    @cached_property
    def logits(self) -> Tensor:
        """[B, C] logits of the task's head."""
        logits: Tensor = self._heads[self.task](self.features)
        return logits

    @cached_property
    def task_logits(self) -> Tensor:
        """[B, K] logits of the router for the task that an image belongs to."""
        router = self._pass.merged.router
        if router is None or not router.knows_tasks:
            raise InputError("the task of an image is the business of a router with logits; this run has none")
        known = self._look_up("shared")
        return cast(Callable[[Tensor], Tensor], router.logits)(
            self._pass.shared[self.task][0] if known is None else known[0]
        )

    @cached_property
    def teacher(self) -> Teacher:
        """The expert's outputs for these images."""
        known = self._look_up("expert")
        if known is None:
            raise InputError(
                "this run has not prepared the experts' outputs: the objective must declare that it needs a teacher"
            )
        return Teacher(self._teachers[self.task], known[0], known[1:])

    @property
    def anchors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For every residual block, what merge and expert make of the expert's anchors there, [N, ...] each."""
        rows = self._known("anchors", self.task, None)
        if rows is None:
            raise InputError("this run has no anchors: the objective must declare that it needs them")
        blocks = self._pass.merged.alone
        for name, inputs, targets in zip(blocks.shapes, rows[::2], rows[1::2], strict=True):
            yield blocks(name, self._pass.weights, inputs), targets

    def _look_up(self, what: str) -> list[Tensor] | None:
        return self._known(what, self.task, self.part)

    @property
    def labels(self) -> Tensor:
        """[B] labels, in a run that is allowed to see them."""
        if "labels" not in self.part:
            raise InputError("this stream has no labels")
        return self.part["labels"]
