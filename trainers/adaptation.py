"""The one LightningModule behind every adaptive method."""

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from adamerge import InputError, TaskVectors
from adamerge.export import export
from adamerge.objectives import entropy
from adamerge.rules import Store, Transform, transform
from adamerge.suites import Suite
from adamerge.suites.measuring import informed
from adamerge.watching import evaluating
from modules import Coefficients, Correction, Elements, Entropy, Head, MergedModel, Objective, Pass, Router, View
from trainers.checkpoints import ENTRY, check_entry, entry
from trainers.checks import check, useless
from trainers.finding import ByRouter, TaskFinder, regrouped
from trainers.finetune import fine_tune
from trainers.finite import Finite, check_finite
from trainers.keeping import KeptMemory
from trainers.learning import LearningModule
from trainers.phases import Known, Phase, asks_router, boundaries, look_ahead
from trainers.pools import adopt
from trainers.programs import Losses, Program, average
from trainers.seeding import drawing
from trainers.settings import describe
from trainers.steps import Batch

log = logging.getLogger(__name__)


class Adaptation(LearningModule):
    """Test-time adaptation of a merge: frozen experts, a few learned numbers, no labels.

    A method is a choice on independent axes: how task vectors are prepared, what weights them (coefficients, a router),
    what corrects the result, what is minimised, and which of these parts learn. A step takes images of every task, sums
    the tasks' mean losses, min Σ_t mean_x ℓ(head_t(f(x; θ₀ + Σₖ λₖ τₖ))), and moves the parts that learn: the
    coefficients, in plain AdaMerging (arXiv:2310.02575). A checkpoint holds the learned tensors, their names and the
    fingerprints of base and experts; it loads against the same experts only.

    Args:
        suite: base, experts, heads and tasks. `Adaptation.load_from_checkpoint(path, suite=...)` takes another one,
            whose files have moved; the fingerprints must agree.
        transforms: what is done to the task vectors first, in this order (TIES, SVD, pruning, another anchor, ...).
        coefficients: how finely the task vectors are weighted, and within which bounds.
        elements: what is learned for every element of the merged weights; default: nothing.
        router: weights that depend on the input, in some layers; default: none.
        correction: what each task adds for itself; default: nothing.
        objective: the loss per image.
        learn: the parts that learn: any of coefficients, elements, router, correction, heads; default: all but the
            heads.
        program: what a step does with its batch; default: all tasks' losses at once.
        phases: several objectives one after another, instead of `objective`, `learn` and `program`.
        optimizer: builds the optimiser from the learned parameters.
        learning_rates: by part, where it is not the optimiser's; those of parts that do not learn are not used.
        micro_batches: one forward and backward pass per task instead of one over all of them: the same gradient, and
            the activations of one task at a time in memory. Without, a run on a CPU keeps what it frees for its next
            step (see `adamerge.memory.kept`).
        task_id: `given`: every image is scored by the head of its task; `inferred`: by that of the task which the
            finder finds, and a wrong task counts as a wrong answer.
        finder: of the task of an image; default: the router.
        allow_labels: let objectives see labels.
        skip_steps: how many steps in a row may be skipped, and counted, since their gradient is not finite, before the
            run stops with what it had learned until then; 0 stops at the first.
    """

    def __init__(
        self,
        suite: Suite,
        coefficients: Coefficients | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = partial(torch.optim.Adam, lr=1e-3),
        micro_batches: bool = False,
        transforms: list[Transform] | None = None,
        router: Router | None = None,
        correction: Correction | None = None,
        learn: list[str] | None = None,
        phases: list[Phase] | None = None,
        learning_rates: dict[str, float] | None = None,
        task_id: Literal["given", "inferred"] = "given",
        allow_labels: bool = False,
        elements: Elements | None = None,
        program: Program | None = None,
        skip_steps: int = 10,
        finder: TaskFinder | None = None,
    ) -> None:
        super().__init__(optimizer, learning_rates or {})
        self.suite, self.micro_batches, self.task_id, self.allow_labels = suite, micro_batches, task_id, allow_labels
        #: The suite with all of its experts, and those that there are from a step on, where they change.
        self.whole, self.schedule = suite, cast(Callable[[int], tuple[str, ...]] | None, None)
        self.finder = finder or ByRouter()
        self.coefficients = coefficients or Coefficients()
        self.router, self.correction, self.elements = router, correction, elements
        parts = {"coefficients": self.coefficients, "router": router, "correction": correction, "elements": elements}
        self.unbound = copy.deepcopy(parts)
        self.transforms = list(transforms or ())
        self.phases = phases or [Phase(objective or Entropy(), learn, program=program)]
        self.objectives = nn.ModuleList(phase.objective for phase in self.phases)
        self.model: MergedModel | None = None
        self.known, self.finite = Known(), Finite(skip_steps)
        self._phase: int | None = None
        self._ends: list[int] | None = None
        self._odd: str | None = None
        self._figures: dict[str, Tensor] = {}
        self._blank = False
        if phases and (objective or learn or program):
            raise InputError("give objective, learn and program, or phases, not both")

    # -- set-up ------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self._odd = None
        try:
            check(self)
            self.suite.prepare(fine_tune)
        except InputError as error:
            if self._trainer is None or self.trainer.world_size == 1:
                raise
            self._odd = str(error)  # only the first process prepares: `setup` tells the others

    def setup(self, stage: str) -> None:
        if (odd := self.trainer.strategy.broadcast(self._odd)) is not None:
            raise InputError(odd)
        if stage == "fit":  # of an earlier run nothing is left; a checkpoint that is resumed comes after this
            self._phase, self._ends, self.known, self._figures = None, None, Known(), {}
            self.finite.reset()
            for phase in self.phases:
                phase.stepper.reset()

    def configure_callbacks(self) -> list[L.Callback]:
        return [] if self.micro_batches else [KeptMemory()]

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("cpu"):  # Lightning asks for the accelerator, where no file is read
                self._configure()

    def _configure(self) -> None:
        check(self)
        self.suite.prepare(fine_tune)
        self.suite.check()
        heads = {task: Head(self.suite.head(task)) for task in self.suite.tasks}
        features = next(iter(heads.values())).weight.shape[1]
        stored = any(isinstance(step, Store) for step in self.transforms)  # else a tensor would be read for every step
        vectors = TaskVectors.over(*self.suite.states()) if stored else self.suite.task_vectors()
        vectors = transform(vectors, informed(self.transforms, self.suite, self.allow_labels))
        self.model = MergedModel(
            self.suite.backbone(), vectors, self.coefficients, self.router, features, self.suite.scale, self.elements
        )
        if any(phase.objective.blocks for phase in self.phases):
            _ = self.model.blocks  # raises where the backbone has none
        if self.correction is not None:
            sample = self.suite.dataset(self.suite.tasks[0], "test")[0][0][None]
            self.correction.bind(self.model, features, sample.to(self.model.coefficients.raw), self.suite.tasks)
        self.heads.update(heads)
        # Not in the module tree: a teacher never changes, whatever its head's copy learns.
        self.teachers = {task: Head(head.weights()) for task, head in heads.items()}
        self.score({task: self.suite.classes(task) for task in self.suite.tasks}, others=self.task_id == "inferred")
        self.choose(set().union(*map(self.learning, self.phases)))

    def stored_parameters(self) -> int:
        """How many numbers the adapted model consists of, without the heads that every method has."""
        more = [module for part, module in self.parts().items() if part in ("router", "correction")]
        return self.merged.stored_parameters() + sum(p.numel() for module in more for p in module.parameters())

    # -- phases ------------------------------------------------------------------------------------------------------

    def ends(self) -> list[int]:
        """The step at which each phase ends; a resumed run keeps those that it began with, whatever its length."""
        if self._ends is None:
            self._ends = boundaries(self.phases, self.trainer.max_steps)
        if len(self._ends) != len(self.phases):
            raise InputError(f"the checkpoint is of a run of {len(self._ends)} phases, this one has {len(self.phases)}")
        return [*self._ends[:-1], self.trainer.max_steps]

    def _spans(self) -> list[range]:
        """The steps of each phase."""
        return [range(start, end) for start, end in pairwise([0, *self.ends()])]

    def without_images(self) -> list[range]:
        """The steps that take no images, or known vectors in their place."""
        spans = zip(self._spans(), self.phases, strict=True)
        return [steps for steps, phase in spans if self._looks_up(phase) or not phase.objective.images]

    def _looks_up(self, phase: Phase) -> str | None:
        """Which vectors stay the same during a phase, such that its objective needs nothing else of the backbone."""
        parts = self.learning(phase)
        if phase.objective.router_only:
            return "shared" if not {"coefficients", "elements"}.intersection(parts) else None
        inside = {"coefficients", "elements", "router"} | (
            {"correction"} if self.correction and self.correction.inside else set()
        )
        more = phase.objective.blocks or asks_router(phase.objective)
        return "merged" if not inside.intersection(parts) and not more else None

    def begin(self) -> None:
        """Begin the phase anew that the run is in: what was known of its images is no longer so."""
        self._phase = None

    @property
    def phase(self) -> Phase:
        """The phase that the run is in."""
        return self.phases[self._phase or 0]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        number, steps = next((n, s) for n, s in enumerate(self._spans()) if self.trainer.global_step < s.stop)
        if number != self._phase:
            self._phase = number
            learning = self.learning(self.phase)
            for part, module in self.parts().items():
                module.requires_grad_(part in learning and self.phase.stepper.descends)
                if part in ("elements", "router", "correction"):  # what is frozen computes as in evaluation
                    module.train(self.training and part in learning)
            self.known = Known()
            look_ahead(self, steps, self._looks_up(self.phase))

    # -- one step ----------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Logits [B, C] of one task's images [B, 3, H, W]."""
        return self.view(task, {"images": images}).logits

    @property
    def merged(self) -> MergedModel:
        """The merged backbone: images -> features."""
        self.configure_model()
        assert self.model is not None
        return self.model

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        part = batch_idx % self.trainer.accumulate_grad_batches
        with drawing(self.device, torch.initial_seed(), self.trainer.global_step, part, self.trainer.global_rank):
            batch = self.told(batch) if batch else {}
            losses, logits = self.phase.stepper.losses(self, batch) if batch else ({}, {})
        self._blank = not batch
        loss = torch.stack(list(losses.values()) or [0 * p.sum() for _, p in self.learned()]).sum()
        shown, by_task, by_entropy = self._shown(loss, losses, logits, batch)
        self.log("loss", shown, prog_bar=True)
        self._figures |= {f"loss/{task}": by_task[task] for task in losses}
        self._figures |= {f"entropy/{task}": by_entropy[task] for task in logits}
        return {"loss": loss, "losses": torch.stack(list(by_task.values())), "logits": logits}

    def _shown(
        self, loss: Tensor, losses: Mapping[str, Tensor], logits: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss, and each task's mean loss and entropy over all processes' images; NaN where there are none."""
        tasks, zero = self.suite.tasks, torch.zeros((), device=loss.device)
        shares = {task: mean(torch.ones_like(zero), part) for task, part in batch.items()}
        sums = {task: shares[task] * entropy(value).mean() for task, value in logits.items()}
        each = [[values.get(task, zero) for task in tasks] for values in (losses, sums, shares)]
        rows = [torch.stack([value.detach().to(loss) for value in values]) for values in each]
        seen = average(self, torch.cat([loss.detach()[None], *rows]))
        by_task, by_entropy, share = seen[1:].view(3, -1)
        shown = [dict(zip(tasks, values / share, strict=True)) for values in (by_task, by_entropy)]
        return seen[0], shown[0], shown[1]

    def losses(self, batch: Batch, weights: Mapping[str, float] | None = None) -> Losses:
        """Each task's mean loss, weighted if asked for, and its logits if the objective has seen them.

        The plain sum of the losses takes the backward pass.
        """
        logits: dict[str, Tensor] = {}

        def loss(task: str, passed: Pass | None = None) -> Tensor:
            view = self.view(task, batch[task], passed)
            value = (weights or {}).get(task, 1.0) * mean(self.phase.objective(view), batch[task])
            if torch.is_grad_enabled() and not value.requires_grad:
                learning = self.learning(self.phase)
                raise useless(learning[0], self.phase, learning)
            if "logits" in vars(view):
                logits[task] = view.logits.detach()
            return value

        if self.micro_batches and torch.is_grad_enabled():
            merged = set(map(id, self.merged.behind()))
            others = [p for _, p in self.learned() if id(p) not in merged]
            values = self.merged.in_parts((partial(loss, task) for task in batch), others)
            return dict(zip(batch, values, strict=True)), logits
        passed = None if self.micro_batches else self.passing(batch)
        return {task: loss(task, passed) for task in batch}, logits

    def view(self, task: str, part: Mapping[str, Tensor], passed: Pass | None = None) -> View:
        """What objectives see of one task's part of a batch, by a forward pass of its own or one that is shared."""
        passed = passed or self.passing({task: part})
        return View(task, part, passed, self.heads, self.correction, self.known, self.teachers)

    def passing(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Pass:
        """One forward pass over all images of a batch, made when a view asks for it."""
        images = {task: part["images"] for task, part in batch.items()}
        return Pass(self.merged, images, self.training and self.phase.objective.blocks)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.phase.stepper.descends:
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for part, parameters in self.learned_by_part().items():
            if parameters[0].requires_grad and all(p.grad is None for p in parameters):
                raise useless(part, self.phase, self.learning(self.phase))
        norms = [torch.linalg.vector_norm(p.grad.detach()) for _, p in self.learned() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))
        self._figures["gradient_norm"] = norm
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # which skips steps by itself
        if self._blank and not float(norm):
            self.finite.leave_out(self.trainer.global_step + 1)
            optimizer.zero_grad(set_to_none=True)
        elif not scaled and not self.finite.passes(norm, self.trainer.global_step + 1, optimizer):
            optimizer.zero_grad(set_to_none=True)  # what has no gradient is not moved
        if (values := self.coefficients().detach()).numel():
            stats = {"mean": values.mean(), "min": values.min(), "max": values.max()}
            self._figures |= {f"coefficients/{name}": value for name, value in stats.items()}
        # Each figure costs Lightning a third of a millisecond, whether a logger takes it up or not.
        step, every = self.trainer.global_step + 1, max(1, self.trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if step % every == 0 or step in (1, self.trainer.max_steps):
            self.log_dict(self._figures)

    def on_train_epoch_end(self) -> None:
        self.finite.settle()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.should_stop:  # what a logger takes up then is of this step
            self.log_dict(self._figures)

    # -- tasks that are not known ------------------------------------------------------------------------------------

    def told(self, batch: Batch) -> Batch:
        """A batch by task; where the stream does not tell the tasks of its images, by those that are found."""
        if getattr(self.trainer.datamodule, "task_known", True):  # type: ignore[attr-defined]
            return batch
        with evaluating(self):
            passed = self.passing(batch)
            found = {task: self.finder(self, self.view(task, part, passed)) for task, part in batch.items()}
        return regrouped(self, batch, found)

    @torch.no_grad()
    def identify(self, images: Tensor) -> Tensor:
        """[B] positions of the tasks to which the finder takes the images to belong."""
        return self.finder(self, self.view(self.suite.tasks[0], {"images": images}))

    def identified(self, images: Tensor, task: str) -> Tensor:
        """[B] whether the finder takes images of a task to be of that task."""
        return self.identify(images) == self.suite.tasks.index(task)

    def scored(self, images: Tensor, task: str) -> Tensor:
        """As `forward`; where tasks are inferred, [B, C + 1], the last class for images taken to be of another task."""
        return self.answers(self.view(task, {"images": images}))

    def answers(self, view: View) -> Tensor:
        """The logits of a view that are scored; see `scored`."""
        if self.task_id == "given":
            return view.logits
        own = self.finder(self, view) == self.suite.tasks.index(view.task)
        logits = view.logits  # what is not taken to be of this task is wrong, whatever another head makes of it
        other = torch.where(own, -torch.inf, torch.inf).to(logits.dtype)
        return torch.cat([logits, other[:, None]], 1)

    # -- checkpoints and export --------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_finite(self.learned(), self.trainer.global_step)
        programs = [phase.stepper.state_dict() for phase in self.phases]
        more = {"phase_ends": self.ends(), "programs": programs, "finite": self.finite.state_dict()}
        checkpoint[ENTRY] = {**entry(self), **more}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        adopt(self, checkpoint)
        check_entry(checkpoint.get(ENTRY), self)
        self._ends = checkpoint[ENTRY].get("phase_ends")
        self.finite.load_state_dict(checkpoint[ENTRY].get("finite", {}))
        for phase, state in zip(self.phases, checkpoint[ENTRY].get("programs", []), strict=False):
            phase.stepper.load_state_dict(state)

    def describe(self) -> dict[str, Any]:
        """The settings that a result depends on."""
        return describe(self)

    def export(self, path: str | Path) -> Path:
        """Write the merged backbone: a `.safetensors` file, or a folder that `from_pretrained` opens (HF models)."""
        if self.correction is not None:
            what = type(self.correction).__name__
            raise InputError(f"{what} is another one for every task: no single backbone computes what was adapted")
        written = export(self.merged.materialise(), Path(path))
        if "heads" in self.learned_by_part():
            log.warning("%s is the backbone alone: the heads that learned are not in it, only in a checkpoint", written)
        return written


def mean(losses: Tensor, part: Mapping[str, Tensor]) -> Tensor:
    """The mean of a task's losses [B]; their weighted sum where the stream gives images a weight."""
    return (losses * part["weight"].to(losses)).sum() if "weight" in part else losses.mean()
