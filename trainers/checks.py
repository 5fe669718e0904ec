"""What can be wrong with a run and is known before anything is read or made."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.strategies import DDPStrategy

from adamerge import InputError
from adamerge.rules.base import check_transforms
from adamerge.suites import Suite
from modules import Objective
from trainers.phases import PARTS, Phase, asks_router

if TYPE_CHECKING:
    from trainers.adaptation import Adaptation


def check(run: "Adaptation") -> None:
    """Raise InputError for a configuration that cannot work."""
    run.coefficients.check(run.suite.experts)
    check_transforms(run.transforms)
    _check_shares(run.phases)
    knows_tasks = run.router is not None and run.router.knows_tasks
    for phase in run.phases:
        _check_objective(phase, run.learning(phase), knows_tasks, run.allow_labels)
        _check_experts(phase.objective, run.suite)
        phase.stepper.check(run, run.learning(phase))
    if run.task_id == "inferred":
        run.finder.check(run)
    if odd := sorted(set(run.learning_rates) - set(PARTS)):
        raise InputError(f"learning_rates has {odd[0]!r}: parts are {', '.join(PARTS)}")
    if (trainer := run._trainer) is not None:
        if not getattr(trainer.datamodule, "task_known", True) and run.task_id == "given":  # type: ignore[attr-defined]
            raise InputError("the stream does not tell the tasks of its images: set task_id to inferred")
        _check_precision(str(trainer.precision))
        _check_processes(run, trainer)


def _check_shares(phases: Sequence[Phase]) -> None:
    """Every phase has a share of the run."""
    shares = [phase.share for phase in phases[:-1]]
    if any(share <= 0 for share in shares) or sum(shares) >= 1:
        raise InputError(
            f"phases share one run, and the last takes what is left: before it, shares must be positive and sum to "
            f"less than 1, got {shares}"
        )


def _check_objective(phase: Phase, learning: list[str], knows_tasks: bool, allow_labels: bool) -> None:
    """An objective has what it needs, and depends on the parts that learn by it."""
    name = type(phase.objective).__name__
    if "labels" in phase.objective.needs and not allow_labels:
        raise InputError(f"{name} needs labels; set allow_labels to let it see them")
    if asks_router(phase.objective) and not knows_tasks:
        raise InputError(f"{name} needs a router that knows tasks, such as modules.FeatureRouter")
    if phase.objective.router_only and (
        odd := [part for part in learning if part in ("elements", "correction", "heads")]
    ):
        raise useless(odd[0], phase, learning)


def _check_experts(objective: Objective, suite: Suite) -> None:
    """Where experts teach, every task has one of its own."""
    missing = [task for task in suite.tasks if task not in suite.experts]
    if missing and (objective.needs & {"teacher", "anchors"} or asks_router(objective)):
        raise InputError(
            f"{type(objective).__name__} needs an expert of every task; {missing[0]!r} has none among "
            f"{', '.join(suite.experts)}"
        )


def _check_precision(precision: str) -> None:
    if precision.endswith("-true") and "16" in precision:
        raise InputError(f"precision {precision} would round the coefficients away; use bf16-mixed")


def _check_processes(run: "Adaptation", trainer: L.Trainer) -> None:
    """Several processes wait for a gradient of everything that learns, unless they are told not to."""
    if not isinstance(strategy := trainer.strategy, DDPStrategy):
        return
    parts, tasks = [set(run.learning(phase)) for phase in run.phases], len(run.suite.tasks)
    stream = trainer.datamodule  # type: ignore[attr-defined]
    few = (getattr(stream, "tasks_per_step", None) or tasks) < tasks or getattr(stream, "order", None) is not None
    some = few and any(part & {"correction", "heads"} for part in parts)
    if (some or any(part != parts[0] for part in parts)) and not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise InputError("not every step moves every part: set trainer.strategy to ddp_find_unused_parameters_true")


def useless(part: str, phase: Phase, learning: list[str]) -> InputError:
    """What is wrong where an objective does not depend on a part that it should teach."""
    return InputError(
        f"{part} cannot learn from {type(phase.objective).__name__}, which does not depend on it; "
        f"name the parts that do in learn: {learning} has one too many"
    )
