"""The one LightningModule behind every adaptive method."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from adamerge import InputError
from adamerge.checkpoints import load_torch
from adamerge.export import export
from adamerge.fingerprint import SHORT
from adamerge.objectives import entropy
from adamerge.rules import Transform, transform
from adamerge.rules.base import check_transforms
from adamerge.suites import Suite
from modules import Coefficients, Correction, Entropy, Head, MergedModel, Objective, Pass, Router, View
from trainers.finetune import fine_tune
from trainers.phases import PARTS, ExpertOutputs, Known, Phase, asks_router, boundaries, check_shares
from trainers.scoring import ScoredModule
from trainers.streams import Batch, Stream, generator

log = logging.getLogger(__name__)

#: The key of our own entry in a checkpoint.
ENTRY = "adamerge"


class Adaptation(ScoredModule):
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
        router: weights that depend on the input, in some layers; default: none.
        correction: what each task adds for itself; default: nothing.
        objective: the loss per image.
        learn: the parts that learn: any of coefficients, router, correction, heads; default: all but the heads.
        phases: several objectives one after another, instead of `objective` and `learn`.
        optimizer: builds the optimiser from the learned parameters.
        learning_rates: by part, where it is not the optimiser's; those of parts that do not learn are not used.
        micro_batches: one forward and backward pass per task instead of one over all of them: the same gradient, and
            the activations of one task at a time in memory.
        task_id: `given`: every image is scored by the head of its task; `inferred`: by that of the task which the
            router finds, and a wrong task counts as a wrong answer.
        allow_labels: let objectives see labels.
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
    ) -> None:
        super().__init__()
        self.suite, self.optimizer, self.micro_batches = suite, optimizer, micro_batches
        self.coefficients = coefficients or Coefficients()
        self.router, self.correction, self.transforms = router, correction, list(transforms or ())
        self.phases = phases or [Phase(objective or Entropy(), learn)]
        self.objectives = nn.ModuleList(phase.objective for phase in self.phases)
        self.learning_rates, self.task_id, self.allow_labels = dict(learning_rates or {}), task_id, allow_labels
        self.model: MergedModel | None = None
        self.known = Known()
        self._phase: int | None = None
        self._ends: list[int] | None = None
        self._learned: dict[str, str] = {}
        if phases and (objective or learn):
            raise InputError("give objective and learn, or phases, not both")

    # -- set-up ------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self._check()
        self.suite.prepare(fine_tune)

    def setup(self, stage: str) -> None:
        if stage == "fit":  # of an earlier run nothing is left; a checkpoint that is resumed comes after this
            self._phase, self._ends, self.known = None, None, Known()

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self._check()
        self.suite.prepare(fine_tune)
        self.suite.check()
        heads = {task: Head(self.suite.head(task)) for task in self.suite.tasks}
        features = next(iter(heads.values())).weight.shape[1]
        vectors = transform(self.suite.task_vectors(), self.transforms)
        self.model = MergedModel(self.suite.backbone(), vectors, self.coefficients, self.router, features)
        if any(phase.objective.blocks for phase in self.phases):
            _ = self.model.blocks  # raises where the backbone has none
        if self.correction is not None:
            sample = self.suite.dataset(self.suite.tasks[0], "test")[0][0][None]
            self.correction.bind(self.model, features, sample.to(self.model.coefficients.raw))
        self.heads.update(heads)
        # Not in the module tree: a teacher never changes, whatever its head's copy learns.
        self._teachers = {task: Head(head.weights()) for task, head in heads.items()}
        self.score({task: self.suite.classes(task) for task in self.suite.tasks}, others=self.task_id == "inferred")
        self._choose(set().union(*(self._parts(phase) for phase in self.phases)))
        learned = ((name, p) for name, p in self.named_parameters() if p.requires_grad and p.numel())
        self._learned = {name: name.partition(".")[0] for name, _ in learned}
        if not self._learned:
            raise InputError(f"nothing learns: none of {self._parts(self.phases[0])} has a parameter")

    def _check(self) -> None:
        """What can be known before anything is read or made."""
        self.coefficients.check(self.suite.tasks)
        check_transforms(self.transforms)
        check_shares(self.phases)
        precision = str(self.trainer.precision) if self._trainer is not None else ""
        if precision.endswith("-true") and "16" in precision:
            raise InputError(f"precision {precision} would round the coefficients away; use bf16-mixed")
        knows_tasks = self.router is not None and self.router.global_
        for phase in self.phases:
            parts, name = self._parts(phase), type(phase.objective).__name__
            if "labels" in phase.objective.needs and not self.allow_labels:
                raise InputError(f"{name} needs labels; set allow_labels to let it see them")
            if asks_router(phase.objective) and not knows_tasks:
                raise InputError(f"{name} needs a router that knows tasks, such as modules.FeatureRouter")
            if phase.objective.router_only and (odd := [p for p in parts if p in ("correction", "heads")]):
                raise self._useless(odd[0], phase)
        self._check_processes()
        if self.task_id == "inferred" and not knows_tasks:
            raise InputError("task_id 'inferred' needs a router that knows tasks, such as modules.FeatureRouter")
        if odd := sorted(set(self.learning_rates) - set(PARTS)):
            raise InputError(f"learning_rates has {odd[0]!r}: parts are {', '.join(PARTS)}")

    def _check_processes(self) -> None:
        """Several processes wait for a gradient of everything that learns, unless they are told not to."""
        if self._trainer is None or not isinstance(strategy := self.trainer.strategy, DDPStrategy):
            return
        parts = [set(self._parts(phase)) for phase in self.phases]
        few = getattr(self.trainer.datamodule, "tasks_per_step", None) or len(self.suite.tasks)  # type: ignore[attr-defined]
        some = few < len(self.suite.tasks) and any(part & {"correction", "heads"} for part in parts)
        if (some or any(part != parts[0] for part in parts)) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise InputError("not every step moves every part: set trainer.strategy to ddp_find_unused_parameters_true")

    def _useless(self, part: str, phase: Phase) -> InputError:
        """What is wrong where an objective does not depend on a part that it should teach."""
        name, learn = type(phase.objective).__name__, self._parts(phase)
        return InputError(
            f"{part} cannot learn from {name}, which does not depend on it; "
            f"name the parts that do in learn: {learn} has one too many"
        )

    def _parts(self, phase: Phase) -> list[str]:
        """The parts that learn in a phase."""
        there = [part for part in PARTS if part == "heads" or getattr(self, part) is not None]
        if phase.learn is None:
            return there[:-1]
        if not phase.learn:
            raise InputError(f"learn is empty: name some of {', '.join(there)}")
        for part in phase.learn:
            if part not in there:
                why = f"this run has no {part}" if part in PARTS else f"parts are {', '.join(PARTS)}"
                raise InputError(f"{part!r} cannot learn: {why}")
        return phase.learn

    def _choose(self, parts: Iterator[str] | set[str] | list[str]) -> None:
        """Let these parts take gradients, and no other."""
        for part in PARTS:
            if (module := getattr(self, part)) is not None:
                cast(nn.Module, module).requires_grad_(part in parts)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = dict(self.named_parameters())
        groups: dict[str, dict[str, Any]] = {}
        for name, part in self._learned.items():
            rate = {"lr": self.learning_rates[part]} if part in self.learning_rates else {}
            groups.setdefault(part, {"params": [], **rate})["params"].append(parameters[name])
        return self.optimizer(list(groups.values()))

    def learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that adaptation moves, by name."""
        parameters = dict(self.named_parameters())
        return ((name, parameters[name]) for name in self._learned)

    def stored_parameters(self) -> int:
        """How many numbers the adapted model consists of, without the heads that every method has."""
        parts = [getattr(self, part) for part in ("router", "correction")]
        return self.merged.stored_parameters() + sum(p.numel() for m in parts if m is not None for p in m.parameters())

    @property
    def needs(self) -> frozenset[str]:
        """The information that the run takes beyond unlabelled images."""
        return frozenset().union(*(phase.objective.needs for phase in self.phases))

    # -- phases ------------------------------------------------------------------------------------------------------

    def ends(self) -> list[int]:
        """The step at which each phase ends; a resumed run keeps those that it began with, whatever its length."""
        if self._ends is None:
            self._ends = boundaries(self.phases, self.trainer.max_steps)
        if len(self._ends) != len(self.phases):
            raise InputError(f"the checkpoint is of a run of {len(self._ends)} phases, this one has {len(self.phases)}")
        return [*self._ends[:-1], self.trainer.max_steps]

    def without_images(self) -> list[range]:
        """The steps in which known vectors take the place of images."""
        starts = [0, *self.ends()[:-1]]
        return [range(a, b) for a, b, p in zip(starts, self.ends(), self.phases, strict=True) if self._looks_up(p)]

    def _looks_up(self, phase: Phase) -> str | None:
        """Which vectors stay the same during a phase, such that its objective needs nothing else of the backbone."""
        parts = self._parts(phase)
        if phase.objective.router_only:
            return "shared" if "coefficients" not in parts else None
        inside = {"coefficients", "router"} | ({"correction"} if self.correction and self.correction.inside else set())
        more = phase.objective.blocks or asks_router(phase.objective)
        return "merged" if not inside.intersection(parts) and not more else None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        number = next(n for n, end in enumerate(self.ends()) if self.trainer.global_step < end)
        if number != self._phase:
            self._phase = number
            self._choose(self._parts(self.phases[number]))
            for part in (self.router, self.correction):
                if part is not None:  # what is frozen computes as in evaluation
                    part.train(self.training and any(p.requires_grad for p in part.parameters()))
            self._look_ahead(self.phases[number], ([0, *self.ends()])[number], self.ends()[number])

    @property
    def objective(self) -> Objective:
        """What is minimised at present."""
        return self.phases[self._phase or 0].objective

    def _look_ahead(self, phase: Phase, start: int, end: int) -> None:
        """Compute, once per image, what does not change while the phase lasts."""
        self.known, stream = Known(), self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(stream, Stream):
            return
        steps, per_step, same = stream.steps(), self.trainer.accumulate_grad_batches, self._looks_up(phase)

        def keep(what: str, task: str, outputs: Callable[[Tensor], list[Tensor]]) -> None:
            index = steps.all_indices(task, start, end, per_step)
            with self.trainer.precision_plugin.forward_context():
                self.known.fill(what, task, outputs, steps.datasets[task], index, stream.eval_batch_size, self.device)

        def merged(task: str, images: Tensor) -> list[Tensor]:
            return self._pass({task: {"images": images}}).outputs[task]

        if same is not None:
            for task in self.suite.tasks:
                keep(same, task, partial(merged, task) if same == "merged" else lambda x: [self.merged.shared(x)])
        if "teacher" in phase.objective.needs:
            experts = ExpertOutputs(self.suite.backbone(), phase.objective.blocks, self.device)
            vectors = self.suite.task_vectors()
            for task in self.suite.tasks:
                experts.load(vectors.expert(task))
                keep("expert", task, experts)

    # -- one step ----------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Logits [B, C] of one task's images [B, 3, H, W]."""
        return self._view(task, {"images": images}, self._pass({task: {"images": images}})).logits

    @property
    def merged(self) -> MergedModel:
        """The merged backbone: images -> features."""
        self.configure_model()
        assert self.model is not None
        return self.model

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        with self._drawing(batch_idx):
            losses, entropies = self.losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("loss", loss.detach(), prog_bar=True)
        self.log_dict({f"loss/{task}": value.detach() for task, value in losses.items()})
        self.log_dict({f"entropy/{task}": value for task, value in entropies.items()})
        values = {task: value.detach() for task, value in losses.items()}
        return {
            "loss": loss,
            "losses": torch.stack([values.get(t, loss.detach() * torch.nan) for t in self.suite.tasks]),
        }

    @contextmanager
    def _drawing(self, batch_idx: int) -> Iterator[None]:
        """Random numbers (dropout) that depend on seed, step and process alone: a resumed run draws them again."""
        part = batch_idx % self.trainer.accumulate_grad_batches
        drawn = generator(torch.initial_seed(), self.trainer.global_step, part, self.trainer.global_rank)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(drawn.initial_seed())
            yield

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each task's mean loss, whose plain sum takes the backward pass, and the mean entropy of its predictions."""
        entropies: dict[str, Tensor] = {}

        def loss(task: str, passed: Pass) -> Tensor:
            view = self._view(task, batch[task], passed)
            value = self.objective(view).mean()
            if torch.is_grad_enabled() and not value.requires_grad:
                phase = self.phases[self._phase or 0]
                raise self._useless(self._parts(phase)[0], phase)
            if "logits" in vars(view):
                entropies[task] = entropy(view.logits.detach()).mean()
            return value

        if self.micro_batches:
            parts = (partial(lambda task: loss(task, self._pass({task: batch[task]})), task) for task in batch)
            others = [p for _, p in self.learned() if p is not self.coefficients.raw]
            return dict(zip(batch, self.merged.in_parts(parts, others), strict=True)), entropies
        passed = self._pass(batch)
        return {task: loss(task, passed) for task in batch}, entropies

    def _pass(self, batch: Mapping[str, Mapping[str, Tensor]]) -> Pass:
        images = {task: part["images"] for task, part in batch.items()}
        return Pass(self.merged, images, self.training and self.objective.blocks)

    def _view(self, task: str, part: Mapping[str, Tensor], passed: Pass) -> View:
        return View(task, part, passed, self.heads, self.correction, self.known, self._teachers)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        moved = {name: p.grad for name, p in self.learned() if p.grad is not None}
        should = {self._learned[name] for name, p in self.learned() if p.requires_grad}
        for part in should - {self._learned[name] for name in moved}:
            raise self._useless(part, self.phases[self._phase or 0])
        self.log("gradient_norm", torch.linalg.vector_norm(torch.cat([g.detach().flatten() for g in moved.values()])))
        values = self.coefficients().detach()
        if values.numel():
            stats = {"mean": values.mean(), "min": values.min(), "max": values.max()}
            self.log_dict({f"coefficients/{name}": value for name, value in stats.items()})

    # -- tasks that are not known ------------------------------------------------------------------------------------

    @torch.no_grad()
    def identify(self, images: Tensor) -> Tensor:
        """[B] positions of the tasks that the router takes the images to be of."""
        some = self.suite.tasks[0]
        view = self._view(some, {"images": images}, self._pass({some: {"images": images}}))
        return view.task_logits.argmax(1)

    def identified(self, images: Tensor, task: str) -> Tensor:
        """[B] whether the router takes images of a task to be of that task."""
        return self.identify(images) == self.suite.tasks.index(task)

    def scored(self, images: Tensor, task: str) -> Tensor:
        """As `forward`; where tasks are inferred, [B, C + 1], the last class for images taken to be of another task."""
        return self(images, task) if self.task_id == "given" else self.inferred(images, task)

    def inferred(self, images: Tensor, task: str) -> Tensor:
        """[B, C + 1] logits of a task for images whose task the router has to find; the last is of any other task."""
        own = self.identified(images, task)
        logits = self(images, task)  # what is not taken to be of this task is wrong, whatever another head makes of it
        other = torch.where(own, -torch.inf, torch.inf).to(logits.dtype)
        return torch.cat([logits, other[:, None]], 1)

    # -- checkpoints and export --------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is learned, and a router, which begins at random: all else is in the suite."""
        everything = super().state_dict(*args, **kwargs)
        return {name: everything[name] for name in self._stored()}

    def _stored(self) -> list[str]:
        return [n for n, p in self.named_parameters() if n in self._learned or (n.startswith("router.") and p.numel())]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load learned tensors. Raises InputError for others."""
        own = dict(self.named_parameters())
        if strict and (odd := sorted(set(self._stored()) ^ state_dict.keys())):
            raise InputError(f"these are not the learned tensors of this run; they differ in {odd}")
        for name, value in state_dict.items():
            if name in own and own[name].shape != value.shape:
                shapes = f"{list(value.shape)} in the checkpoint, {list(own[name].shape)} here"
                raise InputError(f"these are not the learned tensors of this run; {name} is {shapes}")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[ENTRY] = {
            "tasks": list(self.merged.tasks),
            "rows": list(self.coefficients.groups),
            "fingerprints": self.merged.fingerprints,
            "transforms": [settings(each) for each in self.transforms],
            "phase_ends": self.ends(),
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        entry = checkpoint.get(ENTRY)
        self._ends = (entry or {}).get("phase_ends")
        if entry is None:
            raise InputError("this checkpoint was not written by an adaptation run")
        _check_fingerprints(entry["fingerprints"], self.merged.fingerprints)
        for what, saved, own in (
            ("tasks", entry["tasks"], list(self.merged.tasks)),
            ("coefficient rows", entry["rows"], list(self.coefficients.groups)),
            ("transforms", entry.get("transforms", []), [settings(each) for each in self.transforms]),
        ):
            if saved != own:
                odd = sorted(set(map(str, saved)) ^ set(map(str, own)))[:3] or "their order"
                raise InputError(f"the checkpoint's {what} are not those of this run; they differ in {odd}")

    def restore(self, path: str | Path) -> "Adaptation":
        """Load what was learned from a checkpoint, into this configuration."""
        if not Path(path).is_file():
            raise InputError(f"no such checkpoint: {path}")
        checkpoint = load_torch(Path(path))
        self.configure_model()
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        return self

    def describe(self) -> dict[str, Any]:
        """The settings that a result depends on."""
        optimizer = self.configure_optimizers()
        plain = {k: v for k, v in optimizer.defaults.items() if isinstance(v, (bool, int, float, tuple))}
        phases = [{"objective": settings(p.objective), "learn": self._parts(p), "share": p.share} for p in self.phases]
        return {
            "transforms": [settings(each) for each in self.transforms],
            "coefficients": settings(self.coefficients),
            "router": settings(self.router),
            "correction": settings(self.correction),
            "phases": phases,
            "optimizer": {"name": type(optimizer).__name__, **plain, "by_part": self.learning_rates},
            "task_id": self.task_id,
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "Adaptation":
        """As Lightning's, of tensors and plain values only. Raises InputError for a broken file or a pickle."""
        load_torch(Path(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **kwargs})

    def export(self, path: str | Path) -> Path:
        """Write the merged backbone: a `.safetensors` file, or a folder that `from_pretrained` opens (HF models)."""
        if self.correction is not None:
            what = type(self.correction).__name__
            raise InputError(f"{what} is another one for every task: no single backbone computes what was adapted")
        return export(self.merged.materialise(), Path(path))


def _check_fingerprints(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    odd = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if odd:
        words = "; ".join(
            f"{name}: {saved.get(name, 'absent')[:SHORT]} in the checkpoint, {own.get(name, 'absent')[:SHORT]} here"
            for name in odd
        )
        raise InputError(f"the checkpoint was learned on other models ({words}); give the suite it was made with")


def settings(thing: object) -> dict[str, Any] | None:
    """A class's name and the arguments it was made with, as far as they are plain values."""
    if thing is None:
        return None
    given = {name: getattr(thing, name, None) for name in inspect.signature(type(thing)).parameters}
    plain = {name: value for name, value in given.items() if isinstance(value, (bool, int, float, str, list))}
    parts = {n: [settings(part) for part in value] for n, value in given.items() if isinstance(value, nn.ModuleList)}
    return {"name": type(thing).__name__, **plain, **parts}
