"""What starting up takes; a part of `python -m benchmarks.scaling`."""

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import lightning as L

ROOT = Path(__file__).parents[1]
#: No process takes itself apart at its end, which takes a second: the first step would look as early as `--help`.
_ENDING = "import atexit, os; atexit.register(os._exit, 0); "


class FirstStep(L.Callback):
    """Ends the process where the first step begins."""

    def on_train_batch_start(self, *_: object) -> None:
        os._exit(0)


def start(repeats: int) -> dict[str, float]:
    """Processor seconds of `--help`, and wall seconds until the first step of the quickstart, over the imports."""
    fit = [sys.executable, "train.py", "fit", "--config", "configs/quickstart.yaml", "--name", "scaling"]
    commands = {
        "import torch and lightning": [sys.executable, "-c", f"{_ENDING}import torch, lightning.pytorch"],
        "train.py --help": [sys.executable, "-c", f"{_ENDING}from trainers.cli import main; main(['--help'])"],
        "fit, to its first step": [*fit, "--trainer.callbacks+=benchmarks.start.FirstStep"],
    }
    rounds = [[_run(command) for command in commands.values()] for _ in range(repeats + 1)][1:]  # in turns
    (own, imports), (shown, helped), (_, began) = (
        map(statistics.median, zip(*each, strict=True)) for each in zip(*rounds, strict=True)
    )
    seconds = {f"{name}, wall": wall for name, wall in zip(commands, (imports, helped, began), strict=True)}
    return {**seconds, "--help / import, processor time": shown / own, "--help / import, wall": helped / imports,
            "first step after --help": statistics.median(fit[1] - shown[1] for _, shown, fit in rounds)}  # fmt: skip


def _run(command: list[str]) -> tuple[float, float]:
    """Processor and wall seconds of a command."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=ROOT)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - begun
    return after.ru_utime - before.ru_utime, wall
