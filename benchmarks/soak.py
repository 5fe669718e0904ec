"""A long online run: `python -m benchmarks.soak --steps 50000`.

Adapts a small pool online, with a report and a guard, and prints by how much resident memory grew after the first 1,000
steps and how the last 1,000 steps compare with the first in speed.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge import TaskVectors
from adamerge.backbones import MLP
from adamerge.data import ArrayImages, Preprocess
from adamerge.suites import HeadWeights, Split, Suite
from modules import Coefficients, Entropy
from trainers import Adaptation, Guard, Shuffled, Stream
from trainers.report import Report

PART = 1000


class Small(Suite):
    """Noise of three tasks, and experts at random around a random base."""

    name, tasks = "small", ("one", "two", "three")  # type: ignore[assignment]

    def __init__(self, images: int) -> None:
        rng = torch.Generator().manual_seed(0)
        state = self.backbone().state_dict()
        base = {name: 0.5 * torch.randn(value.shape, generator=rng) for name, value in state.items()}
        self._vectors = TaskVectors.from_state_dicts(
            base,
            {t: {n: w + 0.2 * torch.randn(w.shape, generator=rng) for n, w in base.items()} for t in self.tasks},
        )
        pixels = torch.randint(256, (images, 4, 4, 3), generator=rng, dtype=torch.uint8)
        labels = torch.randint(3, (images,), generator=rng)
        self._images = ArrayImages(pixels.numpy(), labels.numpy(), Preprocess())
        self._head = HeadWeights(torch.randn(3, 8, generator=rng))

    def backbone(self) -> torch.nn.Module:
        return MLP(image_size=4, dim=8)

    def task_vectors(self) -> TaskVectors:
        return self._vectors

    def classes(self, task: str) -> tuple[str, ...]:
        return ("a", "b", "c")

    def head(self, task: str) -> HeadWeights:
        return self._head

    def dataset(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        return self._images


class Watch(L.Callback):
    """Resident memory and time, every 1,000 steps."""

    def __init__(self) -> None:
        self.memory: list[float] = []
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1 or trainer.global_step % PART == 0:
            self.memory.append(resident())
            self.times.append(time.process_time())


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main(args: Sequence[str] | None = None) -> None:
    """Run, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=50_000)
    steps = parser.parse_args(args).steps
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    watch, callbacks = Watch(), [Report(references=False, figures=False), Guard(every=100, keep="information")]
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=[watch, *callbacks], logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, limit_val_batches=0,
            enable_checkpointing=False,
        )  # fmt: skip
        run = Adaptation(Small(-(-4 * steps // 3)), Coefficients("tensor"), Entropy())
        trainer.fit(run, datamodule=Stream(batch_size=4, order=Shuffled()))
    seconds = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    found = {
        "steps": trainer.global_step,
        "memory_mb": [round(m, 1) for m in watch.memory],
        "growth_mb": round(watch.memory[-1] - watch.memory[1], 2),
        "throughput_ratio": round(seconds[0] / seconds[-1], 3),
        "seconds": [round(each, 2) for each in seconds],
    }
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
