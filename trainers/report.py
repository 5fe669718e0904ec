"""The callback that follows a run and leaves its results and figures."""

import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from adamerge import write_coefficients
from adamerge.files import write_text
from trainers import figures
from trainers.adaptation import Adaptation
from trainers.budget import budget, guards, information, learns
from trainers.evaluation import Accuracy, accuracy, average, reference_rows
from trainers.prequential import Prequential
from trainers.results import Results
from trainers.streams import Stream
from trainers.traces import Snapshots, Trace

log = logging.getLogger(__name__)

Logits = Callable[[Tensor, str], Tensor]


class Report(L.Callback):
    """Scores the merge before and after adaptation beside the reference rows, and writes results and figures.

    Into the run's folder go `results.json`, `results.md`, `coefficients.json` and `figures/`. What is followed on the
    way is part of the checkpoint: a resumed run reports all of it. Of a stream that passes once, every image is
    predicted before it is adapted on: its accuracies and their curves are reported as "this run, online".

    Args:
        every: steps between two snapshots of the coefficients.
        references: score the base, the experts and static merges too (once per suite; kept in the cache folder).
        figures: draw the figures.
        scores: score anything at all, which takes labels.
    """

    def __init__(self, every: int = 10, references: bool = True, figures: bool = True, scores: bool = True) -> None:
        self.every, self.references, self.figures, self.scores = every, references, figures, scores
        self.trace, self.online, self.snapshots = Trace(), Prequential(), Snapshots(every)
        self.accuracies: dict[int, Accuracy] = {}
        self.attacks: dict[str, Accuracy] = {}
        self.seconds = 0.0
        self._since = self._step_began = time.monotonic()

    @property
    def losses(self) -> list[Tensor]:
        """Losses [T] over the run, NaN where a task had no images; see `Trace`."""
        return self.trace.losses

    # -- while the run goes on -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            log.info("%s", budget(pl_module, trainer.datamodule))  # type: ignore[attr-defined]
            if self.scores and 0 not in self.accuracies:
                self.accuracies[0] = self._score(trainer, pl_module, pl_module.scored)
                self.attacks["start"] = self._score_attacks(trainer, pl_module)
            if not self.snapshots.values:  # a resumed run has its own already
                self._snapshot(trainer, pl_module)
        self._since = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(pl_module, Adaptation) and self.snapshots.of_others(pl_module.merged.tasks):
            self._snapshot(trainer, pl_module)
        if self.scores and isinstance(pl_module, Adaptation) and isinstance(stream, Stream) and stream.order:
            self.online.predict(trainer, pl_module, batch)
        self._step_began = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if not isinstance(pl_module, Adaptation):
            return
        self._tick()
        self.trace.add(trainer.global_step, time.monotonic() - self._step_began, outputs["losses"])
        if self.snapshots.due(trainer.global_step) or trainer.global_step == trainer.max_steps:
            self._snapshot(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation) and self.trace.steps:  # a run may end before its last step
            self._snapshot(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation) and trainer.state.fn == "fit":
            scores = {task: float(trainer.callback_metrics[f"accuracy/{task}"]) for task in pl_module.suite.tasks}
            self.accuracies[trainer.global_step] = scores

    def state_dict(self) -> dict[str, Any]:
        self._tick()
        return {
            **self.trace.state_dict(),
            "online": self.online.state_dict(),
            **self.snapshots.state_dict(),
            "accuracies": dict(self.accuracies),
            "attacks": dict(self.attacks),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.trace.load_state_dict(state_dict)
        if "online" in state_dict:  # older checkpoints know of no such stream
            self.online.load_state_dict(state_dict["online"])
        self.snapshots.load_state_dict(state_dict)
        self.accuracies = dict(state_dict["accuracies"])
        self.attacks = dict(state_dict.get("attacks", {}))
        self.seconds = state_dict["seconds"]

    # -- at the end ----------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, Adaptation) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        results = self._results(trainer, pl_module)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            results.write(folder)
            if pl_module.coefficients.groups:
                table = pl_module.coefficients.table(pl_module.merged.fingerprints)
                write_coefficients(table, folder / "coefficients.json")
            if len(self.online.table()):
                write_text(folder / "prequential.json", json.dumps(self.online.curves(pl_module.suite.tasks), indent=1))
            if self.figures:
                self._draw(pl_module, results, folder / "figures")
            if self.scores:
                results.show()
            for when, rates in self.attacks.items():
                words = ", ".join(f"{task} {100 * rate:.1f} %" for task, rate in rates.items())
                if words:
                    Console().print(f"Planted attacks succeed, {when}: {words}", highlight=False)
            Console().print(f"Results, coefficients and figures are in {folder}", soft_wrap=True)
        trainer.strategy.barrier("report")

    def _score(
        self, trainer: L.Trainer, module: Adaptation, logits: Logits, datasets: Mapping[str, Any] | None = None
    ) -> Accuracy:
        """Accuracy in evaluation mode, shared out among the processes."""
        stream: Stream = trainer.datamodule  # type: ignore[attr-defined]
        shard = (trainer.global_rank, trainer.world_size)
        module.eval()
        with trainer.precision_plugin.forward_context():
            datasets = stream.eval_tasks() if datasets is None else datasets
            scores = accuracy(logits, datasets, stream.eval_batch_size, module.device, stream.num_workers, shard)
        module.train()
        return scores

    def _score_attacks(self, trainer: L.Trainer, module: Adaptation) -> Accuracy:
        """How often an attack that is planted in an expert succeeds, by task."""
        attacks = {task: images for task in module.suite.tasks if (images := module.suite.attack(task)) is not None}
        return self._score(trainer, module, module.scored, attacks)

    def _results(self, trainer: L.Trainer, module: Adaptation) -> Results:
        stream: Stream = trainer.datamodule  # type: ignore[attr-defined]
        rows, measured = self._scored(trainer, module) if self.scores else ({}, {})
        timed = self.trace.seconds if learns(module) else []  # else its steps are those of scoring
        settings = {
            "seed": stream.seed,
            "steps": trainer.global_step,
            "skipped_steps": module.finite.skipped,
            "learned_parameters": sum(p.numel() for _, p in module.learned()) if learns(module) else 0,
            "stored_parameters": module.stored_parameters(),
            "wall_seconds": round(self.seconds, 1),
            "seconds_per_step": round(statistics.median(timed), 4) if timed else None,
            **measured,
            "information": sorted(information(module, stream)),
            "method": module.describe(),
            "suite_arguments": module.hparams.get("suite", {}).get("init_args", {}),
            "stream": stream.describe(),
            "guards": [guard.describe() for guard in guards(module)],
            "trainer": {
                "precision": trainer.precision,
                "processes": trainer.world_size,
                "accumulated_batches": trainer.accumulate_grad_batches,
                "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
            },
            "versions": {"torch": torch.__version__, "lightning": L.__version__},
            "fingerprints": module.merged.fingerprints,
            **({"experts": self.snapshots.experts} if len(self.snapshots.experts) > 1 else {}),
        }
        return Results(module.suite.name, module.suite.tasks, rows, settings)

    def _scored(self, trainer: L.Trainer, module: Adaptation) -> tuple[dict[str, Accuracy], dict[str, Any]]:
        """The rows of accuracies, and what else takes labels or is measured along with them."""
        stream: Stream = trainer.datamodule  # type: ignore[attr-defined]
        rows: dict[str, Accuracy] = {}
        if self.references:
            rows = reference_rows(
                module.suite, stream.eval_tasks(), stream.eval_batch_size, module.device, module.merged.fingerprints,
                stream.num_workers, (trainer.global_rank, trainer.world_size),
            )  # fmt: skip
        rows["this run, start"] = self.accuracies[0]
        began = time.monotonic()
        rows |= self._passed(module)
        rows["this run, adapted"] = self._score(trainer, module, module.scored)
        per_image = (time.monotonic() - began) / sum(map(len, stream.eval_tasks().values()))  # type: ignore[arg-type]
        self.accuracies[trainer.global_step] = rows["this run, adapted"]
        more: dict[str, Any] = {"seconds_per_evaluated_image": float(f"{per_image:.2g}")}
        if module.task_id == "inferred":
            rows["this run, task given"] = self._score(trainer, module, module)
            more["task_identification"] = self._score(trainer, module, module.identified)
        if stream.tasks and (unseen := [task for task in module.suite.tasks if task not in stream.tasks]):
            both = {"start": rows["this run, start"], "adapted": rows["this run, adapted"]}
            more["unseen_tasks"] = {when: average({task: row[task] for task in unseen}) for when, row in both.items()}
        if any(self.attacks.values()):
            self.attacks["adapted"] = self._score_attacks(trainer, module)
            more["attack_success"] = self.attacks
        return rows, more

    def _passed(self, module: Adaptation) -> dict[str, Accuracy]:
        """Rows of a stream that passes once, each image predicted before it was adapted on."""
        if not len(self.online.table()):
            return {}
        rows = {"this run, online": self.online.accuracy(module.suite.tasks)}
        if module.task_id == "inferred":
            rows["this run, online, task given"] = self.online.accuracy(module.suite.tasks, given=True)
        return rows

    def _draw(self, module: Adaptation, results: Results, folder: Path) -> None:
        tasks, groups, now = module.suite.tasks, module.coefficients.groups, module.merged.tasks
        steps, values, pool = self.snapshots.table()
        if not torch.equal(values[0], values[-1]):  # coefficients that learn
            own = [pool.index(name) for name in now]
            start = torch.stack([values[~values[:, 0, k].isnan(), :, k][0] for k in own], 1)
            figures.coefficient_map(values[-1][:, own], groups, now, start, folder / "coefficients.png")
            figures.coefficient_paths(steps, values, pool, folder / "coefficients_over_steps.png")
        losses = torch.stack([loss.cpu() for loss in self.trace.losses])
        experts = results.rows.get("experts")
        names = ", then ".join(type(phase.objective).__name__ for phase in module.phases)
        figures.progress(self.trace.steps, losses, names, self.accuracies, experts, tasks, folder / "progress.png")
        if len(self.online.table()):
            figures.online(self.online.curves(tasks), tasks, folder / "online.png")
        if results.rows:
            figures.accuracy_bars(results.rows, tasks, folder / "accuracy.png")
        for phase in module.phases:
            phase.stepper.figures(tasks, folder)

    def _snapshot(self, trainer: L.Trainer, module: Adaptation) -> None:
        self.snapshots.add(trainer.global_step, module.coefficients.means(), module.merged.tasks)

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
