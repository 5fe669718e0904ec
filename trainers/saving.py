"""When a run's state is written, and how a run ends that is told to stop."""

import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from adamerge import InputError
from adamerge.files import replacing

log = logging.getLogger(__name__)

#: What asks a run to stop: Ctrl-C, schedulers before they kill, SLURM before a job's time is over or it is preempted.
STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1")


class Stopped(SystemExit):
    """A run that was told to stop, and has left everything in its last checkpoint; the exit code is a shell's."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Checkpoint(ModelCheckpoint):
    """Keeps `last.ckpt`: of the last step where that costs little, and of the end of a run that ended.

    After a step, `last.ckpt` is written anew unless that would take more than `share` of the time: of few numbers at
    every step, of many after as many steps as it takes. Whoever kills a run loses the steps since then, and no more: it
    resumes bit for bit. The last step is written once callbacks have had their say in how the run ends.

    SIGINT, SIGTERM and SIGUSR1 end a run after the step that they come in, with a checkpoint of it; a second one ends
    it there and then. In a job of SLURM, SIGUSR1 also puts the job back into the queue.

    Args:
        share: the most of a run's time that writing `last.ckpt` may take; 0 writes it every `every_n_train_steps` only.
    """

    def __init__(self, *args: Any, share: float = 0.02, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= share < 1:
            raise InputError(f"checkpoint.share is a fraction in [0, 1), got {share}")
        self.share = share
        self._asked: int | None = None
        self._before: dict[int, Any] = {}
        self._next = 0.0

    # -- while the run goes on -----------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step
        self._next = 0.0
        self._listen()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= trainer.max_steps > 0 or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self._validates(trainer):  # resumed from here, a run would go without; it is written when that is over
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        decide = trainer.strategy.reduce_boolean_decision  # processes write together, and their clocks differ
        due = self._asked is not None or (self.share > 0 and time.monotonic() >= self._next)
        if decide(due, all=False):
            self._write(trainer)
            self._end_if_asked(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        super().on_validation_batch_end(trainer, pl_module, *args)
        if self._training(trainer) and trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False):
            self._write(trainer)  # the rest of it may take longer than who asked will wait
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A checkpoint after the validation of its step, so that a resumed run need not repeat it."""
        super().on_validation_end(trainer, pl_module)
        if self._training(trainer):
            self._save_numbered(trainer)
            self._last_global_step_saved = -1
            self._write(trainer)
            self._end_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._unlisten()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._save_numbered(trainer)
        self._last_global_step_saved = -1  # even of a step that is saved already: a guard may have gone back
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._unlisten()

    def _save_numbered(self, trainer: L.Trainer) -> None:
        """A checkpoint under its step's number, where the step is one of those that have one."""
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    @staticmethod
    def _validates(trainer: L.Trainer) -> bool:
        """Whether a validation follows the step."""
        loop = trainer.fit_loop
        return loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

    def _training(self, trainer: L.Trainer) -> bool:
        """Whether a validation is one between two steps: the last step is written when it is all over."""
        fit = trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run  # type: ignore[attr-defined]
        return fit and trainer.global_step < trainer.max_steps

    def _write(self, trainer: L.Trainer) -> None:
        """Leave `last.ckpt`, unless it is of this step, and see how long that takes."""
        if not self.save_last or trainer.fast_dev_run or self._last_global_step_saved == trainer.global_step:  # type: ignore[attr-defined]
            return
        began = time.monotonic()
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        now = time.monotonic()
        self._next = now + (now - began) * (1 / self.share - 1) if self.share else float("inf")

    # -- being told to stop --------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._asked = None
        if threading.current_thread() is threading.main_thread() and self.save_last:
            numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
            self._before = {number: signal.signal(number, self._ask) for number in numbers}

    def _unlisten(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _end_if_asked(self, trainer: L.Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False):
            return
        number = self._asked or signal.SIGTERM  # another process was asked
        if trainer.is_global_zero:
            name, at = signal.Signals(number).name, f"step {trainer.global_step} of {trainer.max_steps}"
            log.warning(
                "Stopped by %s at %s, which is in %s: the same command with --ckpt_path last goes on from there",
                name, at, self.last_model_path,
            )  # fmt: skip
            if name == "SIGUSR1" and (job := _job()) is not None:
                requeue(job)
        raise Stopped(number)


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that are whole or not there, even where the temporary folder is on another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)  # which, to a path of its own, would not say that a disk is full


def requeue(job: str) -> None:
    """Put a job of SLURM back into the queue; what goes wrong is said, and the checkpoint is there in any case."""
    command = [shutil.which("scontrol") or "scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        log.warning("Job %s is back in the queue", job)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("Job %s could not be put back into the queue: %s", job, error)


def requeued() -> bool:
    """Whether this is a job of SLURM that was started before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def _job() -> str | None:
    """The job of SLURM that this is, if it is one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
