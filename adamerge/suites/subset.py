"""Subset: a part of another suite's tasks and pool, with other models in the place of its experts where wanted."""

from torch import Tensor, nn
from torch.utils.data import Dataset

from adamerge.checkpoints import State, open_state
from adamerge.errors import InputError
from adamerge.suites.base import FineTune, HeadWeights, Split, Suite
from adamerge.task_vectors import TaskVectors


class Subset(Suite):
    """Some tasks of a suite, and a pool of one's own choice: experts of the suite, or merges that were exported before.

    Args:
        suite: where base, heads and images come from.
        tasks: those to adapt and score on; default: all of the suite.
        experts: by name, an expert of the suite or a checkpoint of the backbone; default: all of the suite.
        scale: where coefficients begin that do not say so themselves; default: that of the suite.
    """

    def __init__(
        self,
        suite: Suite,
        tasks: list[str] | None = None,
        experts: dict[str, str] | None = None,
        scale: float | None = None,
    ) -> None:
        if unknown := [task for task in tasks or () if task not in suite.tasks]:
            raise InputError(f"suite {suite.name} has no task {unknown[0]!r}; it has {', '.join(suite.tasks)}")
        self.suite, self.name, self.scale = suite, suite.name, suite.scale if scale is None else scale
        self._tasks = tuple(tasks or suite.tasks)
        self._experts = dict(experts or {name: name for name in suite.experts})

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._tasks

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(self._experts)

    def prepare(self, fine_tune: FineTune) -> None:
        self.suite.prepare(fine_tune)

    def check(self) -> None:
        self.suite.check()

    def backbone(self) -> nn.Module:
        return self.suite.backbone()

    def task_vectors(self) -> TaskVectors:
        return TaskVectors.from_state_dicts(*self.states())

    def states(self) -> tuple[State, dict[str, State]]:
        base, own = self.suite.states()
        return base, {
            name: own[source] if source in own else open_state(source) for name, source in self._experts.items()
        }

    def classes(self, task: str) -> tuple[str, ...]:
        return self.suite.classes(task)

    def head(self, task: str) -> HeadWeights:
        return self.suite.head(task)

    def attack(self, task: str) -> Dataset[tuple[Tensor, int]] | None:
        return self.suite.attack(task)

    def dataset(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        return self.suite.dataset(task, split)
