"""What one adapts on: a base, its experts, their heads and the tasks' images."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from adamerge.checkpoints import State
from adamerge.data import Split as Split
from adamerge.errors import InputError
from adamerge.task_vectors import TaskVectors


@dataclass(frozen=True)
class HeadWeights:
    """A frozen classifier: logits = scale · z Wᵀ + b, with z the feature, of unit length if `normalize`.

    Attributes:
        weight: [C, D].
        bias: [C] or none.
        normalize: True for zero-shot heads, which compare directions.
        scale: the logit scale of a contrastive model (exp of its stored logarithm), else 1.
    """

    weight: Tensor
    bias: Tensor | None = None
    normalize: bool = False
    scale: float = 1.0

    def logits(self, features: Tensor) -> Tensor:
        """Logits [B, C] of features [B, D]."""
        features = F.normalize(features, dim=-1) if self.normalize else features
        bias = None if self.bias is None else self.bias.to(features)
        return self.scale * F.linear(features, self.weight.to(features), bias)


class FineTune(Protocol):
    """How a suite has a missing model trained; `trainers.fine_tune` is one."""

    def __call__(
        self,
        backbone: nn.Module,
        data: Mapping[str, Dataset[tuple[Tensor, int]]],
        classes: Mapping[str, tuple[str, ...]],
        *,
        heads: Mapping[str, HeadWeights] | None,
        steps: int,
        lr: float,
        batch_size: int,
        weight_decay: float,
        seed: int,
        label: str,
    ) -> tuple[dict[str, Tensor], dict[str, HeadWeights]]:
        """Train `backbone` (not changed) on the tasks of `data`; given `heads` stay frozen, missing ones are trained.

        Each step takes `batch_size` images of every task. Returns the trained state dict and the heads.
        """
        ...


class Suite(ABC):
    """A pool of models and the tasks to adapt and score them on.

    A suite is cheap to build: files are opened by `task_vectors`, `head` and `dataset`. `check` looks for what would
    make a run fail later and raises `adamerge.InputError` before work starts.
    """

    #: Shown in results and used in cache names.
    name: str

    #: The usual scale of task arithmetic for such models: where coefficients begin that do not say so themselves.
    scale: float = 0.3

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """The tasks to adapt and score on, by name, in the order of the results."""

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts of the pool, in the order of the task vectors; a task's own expert has the task's name.

        By default one per task. A pool may hold experts that no task needs, and a task may have no expert of its own.
        """
        return self.tasks

    def prepare(self, fine_tune: FineTune) -> None:  # noqa: B027  most suites have nothing to make
        """Make what is missing on this machine (train experts, download data). Runs on one process only."""

    def check(self) -> None:
        """Raise InputError for an empty task, a label outside the classes, or a head that does not fit its task."""
        for task in self.tasks:
            check_task(task, self.classes(task), self.head(task))

    @abstractmethod
    def backbone(self) -> nn.Module:
        """The architecture of base and experts: images [B, 3, H, W] -> features [B, D]. Its weights do not matter."""

    @abstractmethod
    def task_vectors(self) -> TaskVectors:
        """Base and experts, by the names of the backbone's state dict."""

    def states(self) -> tuple[State, Mapping[str, State]]:
        """State dicts of the base and of each expert. Suites over files open them here and read nothing yet.

        By default θ₀ + τₖ, which may differ from what an expert was in its last digit: a suite whose experts come and
        go in mid-run gives them as they were.
        """
        vectors = self.task_vectors()
        return vectors.base, {name: vectors.expert(name) for name in vectors.tasks}

    def attack(self, task: str) -> Dataset[tuple[Tensor, int]] | None:
        """Images with the trigger of an attack planted in the task's expert, labelled with what the attacker wants.

        A merge is attacked with success where it agrees with these labels. None where nobody knows of an attack.
        """
        return None

    @abstractmethod
    def classes(self, task: str) -> tuple[str, ...]:
        """Class names, in the order of the labels."""

    @abstractmethod
    def head(self, task: str) -> HeadWeights:
        """The task's frozen head."""

    @abstractmethod
    def dataset(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        """Images, preprocessed for the backbone, and labels. See `adamerge.data.fetch` for fast batches."""


def check_task(task: str, classes: tuple[str, ...], head: HeadWeights) -> None:
    """Raise InputError unless the head has one row per class of the task."""
    if head.weight.ndim != 2 or head.weight.shape[0] != len(classes):
        raise InputError(
            f"task {task!r} has {len(classes)} classes, its head has shape {list(head.weight.shape)}; "
            f"expected [{len(classes)}, D]"
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise InputError(f"task {task!r}: head bias has shape {list(head.bias.shape)}, expected [{len(classes)}]")
