"""What unlabelled images say of classifiers: agreement with the experts, certainty, stability."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from adamerge import merge
from adamerge.criteria import agreement, certainty, information
from adamerge.data import fetch
from adamerge.objectives import js
from adamerge.rules import Mean, TaskArithmetic
from adamerge.suites import Split, Suite
from modules import Head
from trainers.adaptation import Adaptation
from trainers.phases import ExpertOutputs
from trainers.seeding import generator

#: For every task, the logits [N, C] of the same N images, and the classes that are named for them, as [N, C] or more.
Answers = Mapping[str, tuple[Tensor, Tensor]]

#: Criteria by name and task, all between 0 and 1, the more the better.
Criteria = dict[str, dict[str, float]]


class Judge:
    """Asks classifiers about some unlabelled images of every task, and says how good the answers look.

    Args:
        suite: whose images and experts.
        split: the images that are adapted on.
        images: how many of each task.
        seed: of the draw of images.
        device: where classifiers compute.
    """

    def __init__(
        self, suite: Suite, split: Split = "test", images: int = 256, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.suite, self.device, self._images = suite, torch.device(device), dict[str, Tensor]()
        for task in suite.tasks:
            dataset = suite.dataset(task, split)
            order = torch.randperm(len(dataset), generator=generator(seed, "judge", task))  # type: ignore[arg-type]
            self._images[task] = fetch(dataset, order[:images])[0]
        self._heads = {task: Head(suite.head(task)).to(self.device) for task in suite.tasks}
        self._experts = self._ask_experts()

    @torch.no_grad()
    def ask(self, run: Adaptation) -> Answers:
        """The answers of what was adapted, task by task."""
        run.eval().to(self.device)
        return {task: (self._over(task, run), self._over(task, run.scored)) for task in self.suite.tasks}

    @torch.no_grad()
    def ask_static(self) -> dict[str, Answers]:
        """The answers of merges without adaptation, by name."""
        vectors, model = self.suite.task_vectors(), copy.deepcopy(self.suite.backbone()).eval().to(self.device)

        def answers(state: Mapping[str, Tensor]) -> Answers:
            model.load_state_dict(dict(state))
            logits = {
                task: self._over(task, lambda images, task: self._heads[task](model(images))) for task in self._images
            }
            return {task: (own, own) for task, own in logits.items()}

        return {
            "mean": answers(merge(vectors, [Mean()])),
            "task arithmetic 0.3": answers(merge(vectors, [TaskArithmetic()], 0.3)),
        }

    def criteria(self, first: Answers, second: Answers) -> Criteria:
        """What speaks for a method whose two runs, each on a half of the images, gave these answers.

        agreement: the share of images for which it names the class that the expert names. likeness: 1 − JS / log 2, of
        its predictions and the expert's. information, certainty: see `adamerge.criteria`. stability: the share of
        images for which both runs name the same class. All but the last are means of the two runs.
        """
        found: Criteria = {name: {} for name in ("agreement", "likeness", "information", "certainty", "stability")}
        for task, expert in self._experts.items():
            both = first[task], second[task]
            found["agreement"][task] = _mean(agreement(named, expert) for _, named in both)
            found["likeness"][task] = _mean(1 - js(logits, expert).mean() / math.log(2) for logits, _ in both)
            found["information"][task] = _mean(information(logits) for logits, _ in both)
            found["certainty"][task] = _mean(certainty(logits) for logits, _ in both)
            found["stability"][task] = float(agreement(first[task][1], second[task][1]))
        return found

    @torch.no_grad()
    def _ask_experts(self) -> dict[str, Tensor]:
        experts = ExpertOutputs(self.suite, False, self.device)
        return {task: self._over(task, lambda images, task: experts.logits(task, images)) for task in self.suite.tasks}

    def _over(self, task: str, logits: Callable[[Tensor, str], Tensor]) -> Tensor:
        parts = self._images[task].split(64)
        return torch.cat([logits(part.to(self.device), task).cpu() for part in parts])


def _mean(values: Iterable[Tensor]) -> float:
    return float(torch.stack(list(values)).mean())
