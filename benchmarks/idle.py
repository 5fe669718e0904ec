"""How long a device waits for its images: `python -m benchmarks.idle --device cuda`.

A run of layer-wise AdaMerging by Lightning's trainer and the stream of `train.py`, on random images that lie decoded in
memory, takes its steps in turns with the same run on one batch that never leaves the device. The share of a step in
which the device waits is 1 − seconds of the latter / seconds of the former. Images of the stream stay on the device
("kept") or come from host memory at each step ("moved"; on a CPU as floats, as they always do there).
"""

import argparse
import json
import logging
import statistics
import tempfile
import warnings
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset

from adamerge import TaskVectors
from adamerge.data import ArrayImages, Preprocess
from adamerge.suites import HeadWeights, Split, Suite
from benchmarks.adaptation_step import CLASSES, PRECISION, SIZES, Bench
from benchmarks.teachers import now
from modules import Coefficients
from trainers import Adaptation, Stream
from trainers.steps import Batch, Steps

SAME, KEPT, MOVED = "one batch", "kept", "moved"
#: Steps before the clock starts: memory is laid out, every image is read.
WARM = 5


class Random(Suite):
    """Random experts of one backbone, and random images of 224 × 224 for each of them."""

    name = "random"

    def __init__(self, size: str, experts: int, images: int) -> None:
        self.bench, self.count = Bench(size, experts, 1, "cpu"), images

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.bench.tasks

    def backbone(self) -> nn.Module:
        return self.bench.tower

    def task_vectors(self) -> TaskVectors:
        return self._vectors

    @cached_property
    def _vectors(self) -> TaskVectors:
        dense = self.bench.dense
        return TaskVectors(dense.base, dense.deltas, dense.tasks, fingerprints=dict.fromkeys(("base", *self.tasks), ""))

    def classes(self, task: str) -> tuple[str, ...]:
        return tuple(map(str, range(CLASSES)))

    def head(self, task: str) -> HeadWeights:
        return HeadWeights(self.bench.head)

    def dataset(self, task: str, split: Split) -> Dataset[Any]:
        return self._images

    @cached_property
    def _images(self) -> ArrayImages:
        draw = np.random.default_rng(0)
        pixels = draw.integers(0, 256, (self.count, 224, 224, 3), dtype=np.uint8)
        return ArrayImages(pixels, draw.integers(CLASSES, size=self.count), Preprocess())


class Again(Steps):
    """The first batch of a stream at every step, wherever it is."""

    def __init__(self, steps: Steps, device: torch.device) -> None:
        super().__init__(steps.datasets, steps.batch_size, steps.labels, [])
        self.steps = steps
        first = steps[0].items()
        self.batch = {task: {name: value.to(device) for name, value in part.items()} for task, part in first}

    def __getitem__(self, step: int) -> Batch:
        return self.batch

    def indices_of(self, step: int) -> dict[str, torch.Tensor]:
        return self.steps.indices_of(0)

    def all_indices(self, task: str, start: int, end: int, per_step: int = 1) -> torch.Tensor:
        return self.steps.all_indices(task, 0, 1)


class Repeated(Stream):
    """A stream of one batch."""

    def steps(self) -> Steps:
        assert self.trainer is not None
        return Again(super().steps(), self.trainer.lightning_module.device)


class Clock(L.Callback):
    """Seconds of a step, in the mean of all after the first ones: the device is waited for at both ends alone."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM:
            self.begun = now()

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seconds = (now() - self.begun) / (trainer.global_step - WARM)


def seconds(suite: Random, stream: Stream, args: argparse.Namespace) -> float:
    """Of a step."""
    clock = Clock()
    module = Adaptation(suite, Coefficients(), micro_batches=args.micro_batches)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=args.device, devices=1, precision="bf16-mixed" if args.device == "cuda" else "32-true",
            max_steps=WARM + args.steps, callbacks=[clock], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=stream)
    return clock.seconds


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of each kind, and the share of it in which the device waits."""
    suite = Random(args.size, args.experts, 4 * args.images)
    streams: dict[str, Any] = {
        SAME: lambda: Repeated(args.images, images_on_device=True),
        KEPT: lambda: Stream(args.images, images_on_device=True),
        MOVED: lambda: Stream(args.images, images_on_device=False),
    }
    times: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(args.repeats):
        for name, stream in streams.items():
            times[name].append(seconds(suite, stream(), args))
    found = {name: statistics.median(values) for name, values in times.items()}
    return {**found, **{f"idle, {name}": 1 - found[SAME] / found[name] for name in (KEPT, MOVED)}}


def main() -> None:
    """Print the seconds and the shares, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="ViT-B/32")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="per task")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=30, help="of a run, after the first ones")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--micro-batches", action="store_true")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    console, found = Console(), measured(args)
    console.print(
        f"{args.size}, K = {args.experts}, {args.images} images per task, {args.device}, {PRECISION[args.device]}"
    )
    for name, value in found.items():
        console.print(f"{name}: {value:.3g}" if "idle" not in name else f"{name}: {value:.1%}", highlight=False)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    console.print(json.dumps({**vars(args), **versions, **found}), soft_wrap=True)


if __name__ == "__main__":
    main()
