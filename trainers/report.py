"""The callback that follows a run and leaves its results and figures."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from adamerge import write_coefficients
from trainers import figures
from trainers.adaptation import Adaptation
from trainers.evaluation import accuracy, reference_rows
from trainers.results import Results
from trainers.streams import Stream

log = logging.getLogger(__name__)


class Report(L.Callback):
    """Scores the merge before and after adaptation beside the reference rows, and writes results and figures.

    Into the run's folder go `results.json`, `results.md`, `coefficients.json` and `figures/`. What is followed on the
    way is part of the checkpoint: a resumed run reports all of it.

    Args:
        every: steps between two snapshots of the coefficients.
        references: score the base, the experts and static merges too (once per suite; kept in the cache folder).
        figures: draw the figures.
    """

    def __init__(self, every: int = 10, references: bool = True, figures: bool = True) -> None:
        self.every, self.references, self.figures = every, references, figures
        self.steps: list[int] = []
        self.losses: list[Tensor] = []
        self.snapshots: dict[int, Tensor] = {}
        self.accuracies: dict[int, dict[str, float]] = {}
        self.seconds = 0.0
        self._since = time.monotonic()

    # -- while the run goes on -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.monotonic()
        if isinstance(pl_module, Adaptation):
            self._snapshot(trainer, pl_module)
            count = sum(p.numel() for _, p in pl_module.learned())
            needs = ", ".join(sorted(pl_module.objective.needs)) or "nothing"
            log.info("Learns %d numbers; beyond images, %s needs: %s", count, type(pl_module.objective).__name__, needs)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if not isinstance(pl_module, Adaptation):
            return
        self._tick()
        self.steps.append(trainer.global_step)
        self.losses.append(outputs["losses"])
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._snapshot(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, Adaptation) and trainer.state.fn == "fit":
            scores = {task: float(trainer.callback_metrics[f"accuracy/{task}"]) for task in pl_module.suite.tasks}
            self.accuracies[trainer.global_step] = scores

    def state_dict(self) -> dict[str, Any]:
        losses = torch.stack([loss.cpu() for loss in self.losses]) if self.losses else torch.zeros(0)
        self._tick()
        return {
            "steps": list(self.steps),
            "losses": losses,
            "snapshots": dict(self.snapshots),
            "accuracies": dict(self.accuracies),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.losses = list(state_dict["steps"]), list(state_dict["losses"])
        self.snapshots, self.accuracies = dict(state_dict["snapshots"]), dict(state_dict["accuracies"])
        self.seconds = state_dict["seconds"]

    # -- at the end ----------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, Adaptation) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            results = self._results(trainer, pl_module)
            results.write(folder)
            write_coefficients(
                pl_module.coefficients.table(pl_module.merged.fingerprints), folder / "coefficients.json"
            )
            if self.figures:
                self._draw(pl_module, results, folder / "figures")
            results.show()
            Console().print(f"Results, coefficients and figures are in {folder}", soft_wrap=True)
        trainer.strategy.barrier("report")

    def _results(self, trainer: L.Trainer, module: Adaptation) -> Results:
        stream: Stream = trainer.datamodule  # type: ignore[attr-defined]
        datasets, size, device = stream.eval_tasks(), stream.eval_batch_size, module.device
        rows = {}
        if self.references:
            rows = reference_rows(module.suite, datasets, size, device, module.merged.fingerprints, stream.num_workers)
        with trainer.precision_plugin.forward_context():
            for name, values in (("this run, start", self.snapshots[min(self.snapshots)]), ("this run, adapted", None)):
                with module.coefficients.at(values):
                    heads = dict(module.heads.items())
                    rows[name] = accuracy(module.merged, heads, datasets, size, device, stream.num_workers)
        settings = {
            "seed": stream.seed,
            "steps": trainer.global_step,
            "learned_parameters": sum(p.numel() for _, p in module.learned()),
            "wall_seconds": round(self.seconds, 1),
            "method": module.describe(),
            "suite_arguments": module.hparams.get("suite", {}).get("init_args", {}),
            "stream": stream.describe(),
            "trainer": {
                "precision": trainer.precision,
                "processes": trainer.world_size,
                "accumulated_batches": trainer.accumulate_grad_batches,
                "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
            },
            "versions": {"torch": torch.__version__, "lightning": L.__version__},
            "fingerprints": module.merged.fingerprints,
        }
        return Results(module.suite.name, module.suite.tasks, rows, settings)

    def _draw(self, module: Adaptation, results: Results, folder: Path) -> None:
        tasks, groups = module.suite.tasks, module.coefficients.groups
        steps = sorted(self.snapshots)
        values = torch.stack([self.snapshots[step] for step in steps])
        figures.coefficient_map(values[-1], groups, tasks, values[0], folder / "coefficients.png")
        figures.coefficient_paths(steps, values, tasks, folder / "coefficients_over_steps.png")
        losses = torch.stack([loss.cpu() for loss in self.losses])
        experts = results.rows.get("experts")
        scored = {0: results.rows["this run, start"], **self.accuracies} if self.accuracies else {}
        figures.progress(
            self.steps, losses, type(module.objective).__name__, scored, experts, tasks, folder / "progress.png"
        )
        figures.accuracy_bars(results.rows, tasks, folder / "accuracy.png")

    def _snapshot(self, trainer: L.Trainer, module: Adaptation) -> None:
        self.snapshots[trainer.global_step] = module.coefficients().detach().cpu().clone()

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds, self._since = self.seconds + now - self._since, now
