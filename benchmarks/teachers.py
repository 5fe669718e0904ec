"""What the experts' outputs cost where they teach a merge: `python -m benchmarks.teachers`.

They are computed once per image and looked up from then on. Steps are those of `train.py`, on suite Mini, without a
report; what `--only` names is measured:

- surgery: 1,000 steps of Surgery on 16 images of each task, 1,000 images per task, and one pass of the merge and of
  every expert over these images;
- steps: seconds of a step of each objective that has a teacher, over those of an AdaMerging step.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import lightning as L
import torch
from rich.console import Console

from adamerge.data import fetch
from adamerge.memory import kept
from adamerge.suites import Mini
from modules import Coefficients, Correction, Divergence, Entropy, Objective, PseudoLabels, RepresentationL1, Surgery
from trainers import Adaptation, Stream

ADAMERGING = "AdaMerging"


def now() -> float:
    """Seconds, when a GPU has done what it was asked to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(L.Callback):
    """Seconds of every step, and of the whole loop."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.steps: list[float] = []
        self.begun = now()

    def on_train_batch_start(self, *_: Any) -> None:
        self.since = now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(now() - self.since)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seconds = now() - self.begun


def run(
    device: str, steps: int, objective: Objective, learn: list[str], correction: Correction | None = None
) -> tuple[Clock, Adaptation]:
    """Adapt on the training images of Mini, 1,000 of each task, 16 at a step."""
    module = Adaptation(Mini(), Coefficients(), objective, correction=correction, learn=learn)
    clock, stream = Clock(), Stream(batch_size=16, train_split="train", per_task=1000)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=device, devices=1, max_steps=steps, callbacks=[clock], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=stream)
    return clock, module


@torch.no_grad()
def one_pass(module: Adaptation, device: str) -> float:
    """Seconds of the merge and of every expert on 1,000 images of each task."""
    stream: Stream = module.trainer.datamodule  # type: ignore[attr-defined]
    model, datasets, begun = module.suite.backbone().eval().to(device), stream.steps().datasets, now()
    with kept():  # as the run does
        for _ in ("merge", "expert"):
            for dataset in datasets.values():
                for part in torch.arange(1000).split(stream.eval_batch_size):
                    model(fetch(dataset, part)[0].to(device))
    return now() - begun


def surgery(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of 1,000 steps, and what they take beyond one pass."""
    clock, module = run(args.device, 1000, RepresentationL1(), ["correction"], Surgery())
    passed = statistics.median(one_pass(module, args.device) for _ in range(3))
    return {
        "1,000 steps": clock.seconds, "their first, which looks ahead": clock.steps[0], "one pass": passed,
        "beyond one pass": clock.seconds - passed,
    }  # fmt: skip


def steps(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of each kind, by runs in turns, and the ratios to AdaMerging's."""
    kinds: dict[str, Any] = {
        ADAMERGING: lambda: (Entropy(), ["coefficients"]),
        "Tint": lambda: (PseudoLabels(), ["coefficients", "heads"]),
        "Tint++": lambda: (PseudoLabels(filter=True), ["coefficients", "heads"]),
        "KL": lambda: (Divergence("kl"), ["coefficients"]),
        "JS": lambda: (Divergence("js"), ["coefficients"]),
        "Surgery, version 2": lambda: (RepresentationL1(blocks=True), ["correction"], Surgery(blocks=True)),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for repeat in range(args.repeats + 1):
        for name, parts in kinds.items():
            measured = run(args.device, args.length, *parts())[0].steps[1:]  # the first looks ahead
            times[name] += measured if repeat else []  # the first round warms up
    found = {name: statistics.median(values) for name, values in times.items()}
    ratios = {f"{name} / {ADAMERGING}": found[name] / found[ADAMERGING] for name in kinds if name != ADAMERGING}
    return {**found, **ratios}


PARTS = {"surgery": surgery, "steps": steps}


def main() -> None:
    """Measure the parts that are asked for; print them, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--length", type=int, default=15, help="steps of one run of `steps`")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    console, found = Console(), {}
    for part in args.only:
        found[part] = PARTS[part](args)
        for name, value in found[part].items():
            console.print(f"{part}: {name}: {value:.4g}", highlight=False)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    console.print(json.dumps({**vars(args), **versions, **found}), soft_wrap=True)


if __name__ == "__main__":
    main()
