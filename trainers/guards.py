"""The callback that watches a run for collapse, and ends it with the best of what it has seen."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from adamerge import InputError, criteria
from adamerge.data import fetch
from adamerge.watching import evaluating
from trainers.adaptation import Adaptation
from trainers.duels import blind, duel
from trainers.phases import ExpertOutputs
from trainers.seeding import generator
from trainers.settings import settings
from trainers.streams import Stream

log = logging.getLogger(__name__)

#: Standard errors that a difference has to exceed. Were the better of two kept each time, chance would choose: a slow
#: decline would win every other time.
SURE = 2.0
#: How many times as many images the last comparison is made on.
LAST = 4


@dataclass
class Seen:
    """What a guard knows of a run: part of its checkpoints.

    Attributes:
        scores: the criterion, mean over tasks, by step.
        start: the criterion by task at the first snapshot.
        best: what had been learned by the best step.
        champion: that step, in a stream that passes once.
        ended: the step of the snapshot that such a run ended with.
        left: what the run had learned when it ended with something else.
        counts: [C] predictions by class since the last look, by task.
        since: what is wrong, and the step since which it is.
        looked: the step of the last look.
        stopped: whether the run was stopped.
        experts: of which the scores are.
    """

    scores: dict[int, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    looked: int = 0
    stopped: bool = False
    experts: list[str] = field(default_factory=list)
    champion: int | None = None
    ended: int | None = None

    @property
    def best_step(self) -> int:
        """The step of the best snapshot; of equals, the first."""
        if self.champion is not None:
            return self.champion
        return max(self.scores, key=lambda step: (self.scores[step], -step))


class Guard(L.Callback):
    """Watches a run for collapse, which entropy alone rewards, and ends it with the best of what it has seen.

    Every so many steps it looks at the classes which the steps predicted since the last look, at the coefficients, and,
    with `keep`, at the predictions for fixed images of the stream. What is wrong it says in a sentence, once until it
    ends. No label is needed for any of it. A resumed run ends as an undisturbed one; one that is made longer goes on
    from where it was, not from the snapshot that it ended with.

    In a stream that passes once, or that does not tell tasks, it knows no image beforehand: with `keep`, every look
    compares what has been learned with the best so far, on images that have come. Where that is worse by more than two
    standard errors, the run goes back; where it is better by as much, it is the best so far; else the run goes on, and
    what it learns meanwhile adds up until it shows. It ends with the better of the two, on four times as many images.
    Images of unknown tasks count for the task that the best so far takes them to be of.

    Args:
        every: steps between two looks.
        keep: end the run with the best of its snapshots, of which the start is one, by this criterion of
            `adamerge.criteria`: `information`, or `agreement` with the experts, which asks them. Default: keep none.
        images: how many images of each task snapshots are compared on.
        stop: end the run as soon as something is wrong, instead of warning alone.
        one_class: the share of one class among a task's predictions that is wrong; a stream in the order of its classes
            gives cause too.
        bounded: the share of coefficients at a bound that is wrong.
        fall: how far a task's criterion may fall below that of the start.
    """

    def __init__(
        self,
        every: int = 25,
        keep: Literal["information", "agreement"] | None = None,
        images: int = 128,
        stop: bool = False,
        one_class: float = 0.9,
        bounded: float = 0.9,
        fall: float = 0.1,
    ) -> None:
        if every < 1 or images < 2:
            raise InputError(f"a guard looks every 1 or more steps, at 2 or more images: got {every} and {images}")
        self.every, self.keep, self.images, self.stop = every, keep, images, stop
        self.one_class, self.bounded, self.fall = one_class, bounded, fall
        self._experts: dict[str, Tensor] = {}
        self.seen = Seen()

    @property
    def needs(self) -> frozenset[str]:
        """What it is told, as an objective's."""
        return frozenset({"task id", "teacher"} if self.keep == "agreement" else {"task id"})

    def describe(self) -> dict[str, Any]:
        """How it was set up, and the step of which it left the result, if it went back."""
        ended = self.seen.best_step if self.seen.left else None
        return {
            **(settings(self) or {}),
            "ended_with_step": self.seen.ended if self.seen.champion is not None else ended,
        }

    # -- while the run goes on -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, Adaptation):
            return
        if self.keep and not isinstance(trainer.datamodule, Stream):  # type: ignore[attr-defined]
            raise InputError("a guard compares snapshots on images of a trainers.Stream: give one, or no keep")
        if trainer.global_step == 0:
            self.seen = Seen()
        elif self.seen.left:  # resumed after its end, to be made longer
            pl_module.load_state_dict(self.seen.left)
            self.seen.left = {}
        if self.seen.stopped:
            trainer.should_stop = True
        if self.keep and blind(trainer):
            if not self.seen.best:
                self._duel(trainer, pl_module)
            return
        if self.keep == "agreement":
            self._ask_experts(trainer, pl_module)
        if self.keep and not self.seen.scores:
            self._snapshot(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if not isinstance(pl_module, Adaptation):
            return
        for task, logits in outputs["logits"].items():
            counts = F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)
            self.seen.counts[task] = counts + self.seen.counts.get(task, torch.zeros_like(counts)).to(counts.device)
        if trainer.global_step % self.every == 0 and trainer.global_step != self.seen.looked:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, Adaptation) or not self.keep:
            return
        now = trainer.global_step
        if blind(trainer):
            self._duel(trainer, pl_module, last=True)
            return
        if now not in self.seen.scores:
            self._snapshot(trainer, pl_module)
        if (step := self.seen.best_step) != now:
            scores = f"{self.keep} {self.seen.scores[step]:.3f}, {self.seen.scores[now]:.3f} at step {now}"
            log.info("The run ends with what it had learned by step %d: %s", step, scores)
            self.seen.left = _learned(pl_module)
            pl_module.load_state_dict(self.seen.best)

    # -- what is wrong -------------------------------------------------------------------------------------------------

    def _look(self, trainer: L.Trainer, module: Adaptation) -> None:
        began, self.seen.looked = self.seen.looked, trainer.global_step
        wrong = {**self._one_class(trainer, module), **self._at_bounds(module)}
        if self.keep and blind(trainer):
            self._duel(trainer, module)
        elif self.keep:
            wrong |= self._fallen(self._snapshot(trainer, module))
        for what, sentence in wrong.items():
            if what not in self.seen.since:
                log.warning("%s since step %d", sentence, began)
        self.seen.since = {what: self.seen.since.get(what, began) for what in wrong}
        if wrong and self.stop:
            self.seen.stopped = trainer.should_stop = True

    def _one_class(self, trainer: L.Trainer, module: Adaptation) -> dict[str, str]:
        """Sentences on tasks that the steps since the last look put into one class."""
        found = {}
        for task, own in self.seen.counts.items():
            counts = trainer.strategy.reduce(own.to(module.device), reduce_op="sum")
            if (share := float(counts.max() / counts.sum())) >= self.one_class and len(counts) > 1:
                label = module.suite.classes(task)[int(counts.argmax())]
                found[f"class {task}"] = f"{task}: {100 * share:.0f} % of the stream is predicted as class {label}"
        self.seen.counts = {}
        return found

    def _at_bounds(self, module: Adaptation) -> dict[str, str]:
        learns = "coefficients" in module.learned_by_part()
        share = module.coefficients.saturated() if learns else 0.0
        return {"bounds": f"{100 * share:.0f} % of the coefficients are at a bound"} if share >= self.bounded else {}

    def _fallen(self, scores: dict[str, float]) -> dict[str, str]:
        """Sentences on tasks whose criterion is far below that of the start."""
        words = {"information": "information on the class", "agreement": "agreement with the expert"}[self.keep or ""]
        return {
            f"fall {task}": f"{task}: {words} fell from {self.seen.start[task]:.2f} to {score:.2f}"
            for task, score in scores.items()
            if score < self.seen.start[task] - self.fall
        }

    # -- snapshots -----------------------------------------------------------------------------------------------------

    def _snapshot(self, trainer: L.Trainer, module: Adaptation) -> dict[str, float]:
        """The criterion by task; what was learned is kept if it is the best so far on average."""
        if self.seen.experts not in ([], experts := list(module.merged.tasks)):
            self.seen = Seen(looked=self.seen.looked)
        self.seen.experts = experts
        scores = {}
        with evaluating(module), trainer.precision_plugin.forward_context():
            for task, images in self._images(trainer):
                logits = torch.cat([module(part, task) for part in images])
                asked = self.keep == "agreement"
                score = criteria.agreement(logits, self._experts[task]) if asked else criteria.information(logits)
                scores[task] = float(score.nan_to_num())  # nothing is worse than what is no number
        self.seen.start = self.seen.start or scores
        self.seen.scores[trainer.global_step] = sum(scores.values()) / len(scores)
        if self.seen.best_step == trainer.global_step:
            self.seen.best = _learned(module)
        return scores

    def _duel(self, trainer: L.Trainer, module: Adaptation, last: bool = False) -> None:
        """Go back where the best so far is surely better; keep what is surely better than that. At last, either."""
        now, step, best = _learned(module), trainer.global_step, self.seen.best
        if not best:
            self.seen.best, self.seen.champion = now, step
            return
        gain, doubt = duel(trainer, module, best, now, self.images * (LAST if last else 1), self.keep == "agreement")
        if last:
            self.seen.ended = step if gain > 0 else self.seen.champion
        elif gain > SURE * doubt:
            self.seen.best, self.seen.champion = now, step
        if gain > 0 if last else gain >= -SURE * doubt:
            return
        self.seen.left = now if last else {}
        module.load_state_dict(best)
        words = f"{self.keep} {-gain:.3f} ± {doubt:.3f} above that of step {step}"
        log.info("The run goes back to what it had learned by step %d: %s", self.seen.champion, words)

    def _ask_experts(self, trainer: L.Trainer, module: Adaptation) -> None:
        """Keep the experts' logits for the images that snapshots are compared on."""
        experts = ExpertOutputs(module.suite, False, module.device)
        with trainer.precision_plugin.forward_context():
            for task, images in self._images(trainer):
                self._experts[task] = torch.cat([experts.logits(task, part) for part in images])

    def _images(self, trainer: L.Trainer) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Batches of the same images of every task, whenever asked."""
        stream: Stream = trainer.datamodule  # type: ignore[attr-defined]
        device = trainer.strategy.root_device
        for task, dataset in stream.steps().datasets.items():
            order = torch.randperm(len(dataset), generator=generator(stream.seed, "guard", task))  # type: ignore[arg-type]
            chosen = order[: self.images].split(stream.eval_batch_size)
            yield task, (fetch(dataset, index)[0].to(device) for index in chosen)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.seen)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = Seen(**copy.deepcopy(state_dict))


def _learned(module: Adaptation) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
