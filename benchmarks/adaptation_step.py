"""Cost of an adaptation step against an ordinary training step, and of routing: `python -m benchmarks.adaptation_step`.

Same backbone (CLIP's vision tower, random weights), same images, same precision, alternating in one process, so that
the ratio does not depend on what else the machine does. Peak memory is measured in processes of their own; the C
library's own settings (`MALLOC_MMAP_THRESHOLD_=262144`, say) hold for times and memory alike, and are printed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from adamerge import TaskVectors
from adamerge.deltas import AnyDeltas, LowRank
from adamerge.memory import kept
from adamerge.objectives import entropy
from modules import BlockRouter, Coefficients, MergedModel

_NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
SIZES = {
    name: dict(zip(_NAMES, values, strict=True))
    for name, values in {
        "ViT-B/32": (768, 3072, 12, 12, 32),
        "ViT-B/16": (768, 3072, 12, 12, 16),
        "ViT-L/14": (1024, 4096, 24, 16, 14),
        "small": (384, 1536, 4, 6, 32),
        "tiny": (64, 128, 2, 2, 32),
    }.items()
}
CLASSES = 100
#: How steps compute, by device.
PRECISION = {"cpu": "float32", "cuda": "bfloat16 autocast"}
RANK = 16
TRAINING, ADAPTATION = "training step", "adaptation step"
IN_PARTS = "adaptation step, micro-batches"
INFERENCE = "inference"
ROUTED = "WEMoE, a router per MLP, per-sample routing"
FACTORED = f"{ROUTED}, experts of rank {RANK}"
#: What is timed, and what its time is compared to.
KINDS = {
    TRAINING: TRAINING,
    ADAPTATION: TRAINING,
    IN_PARTS: TRAINING,
    f"step, {ROUTED}": ADAPTATION,
    f"step, {FACTORED}": ADAPTATION,
    INFERENCE: INFERENCE,
    f"inference, {ROUTED}": INFERENCE,
    f"inference, {FACTORED}": INFERENCE,
}


class Tower(CLIPVisionModel):
    """Images -> pooled features."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(pixel_values=images).pooler_output


class Bench:
    """One backbone, K random experts, one batch of every task."""

    def __init__(self, size: str, experts: int, per_task: int, device: str) -> None:
        torch.manual_seed(0)
        self.tower = Tower(CLIPVisionConfig(**SIZES[size])).to(device)
        self.tasks = tuple(f"task{k}" for k in range(experts))
        self.images = torch.randn(experts, per_task, 3, 224, 224, device=device)
        self.head = torch.randn(CLASSES, SIZES[size]["hidden_size"], device=device) / 30

    @cached_property
    def base(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.tower.state_dict().items()}

    @cached_property
    def dense(self) -> TaskVectors:
        deltas = {name: self.random(*value.shape) for name, value in self.base.items() if value.is_floating_point()}
        return TaskVectors(self.base, deltas, self.tasks, fingerprints={})

    @cached_property
    def factored(self) -> TaskVectors:
        """Matrices as factors, anything else without a difference."""

        def deltas(value: Tensor) -> AnyDeltas:
            if value.dim() == 2:
                return LowRank(self.random(len(value), RANK), self.random(RANK, value.shape[1]))
            return value.new_zeros(1).expand(len(self.tasks), *value.shape)

        found = {name: deltas(value) for name, value in self.base.items() if value.is_floating_point()}
        return TaskVectors(self.base, found, self.tasks, fingerprints={})

    def random(self, *shape: int) -> Tensor:
        """Deltas of every expert, [K, *shape]."""
        return torch.empty(len(self.tasks), *shape, device=self.head.device).normal_(0, 1e-3)

    def merged(self, kind: str) -> MergedModel:
        """The merge of one kind of step: layer-wise coefficients, or routed MLPs and the rest at fixed ones."""
        vectors = self.factored if FACTORED in kind else self.dense
        model = MergedModel(self.tower, vectors, Coefficients(), BlockRouter() if ROUTED in kind else None)
        model.requires_grad_(True)
        model.coefficients.requires_grad_(ROUTED not in kind)
        return model

    def step(self, kind: str, micro_batch: int) -> Callable[[], None]:
        """What a kind times."""
        if kind == TRAINING:
            return self.training_step()
        if kind.startswith(INFERENCE):
            return self.inference(self.tower if kind == INFERENCE else self.merged(kind).eval())
        return self.adaptation_step(self.merged(kind), micro_batch if kind == IN_PARTS else 0)

    def inference(self, model: nn.Module) -> Callable[[], None]:
        """A forward pass over the concatenated batch."""
        images = self.images.flatten(0, 1)

        @torch.no_grad()
        def run() -> None:
            model(images)

        return run

    def loss(self, features: Tensor) -> Tensor:
        return entropy(features @ self.head.T).mean()

    def training_step(self) -> Callable[[], None]:
        """Forward and backward pass with weight gradients of the plain backbone on the concatenated batch."""
        images = self.images.flatten(0, 1)

        def step() -> None:
            self.tower.zero_grad()
            self.loss(self.tower(images)).backward()

        return step

    def adaptation_step(self, model: MergedModel, micro_batch: int) -> Callable[[], None]:
        """The same on the merge, down to the coefficients' gradient and their update; 0: one forward pass for all."""
        per_task = self.images.shape[1]
        parts = self.images.flatten(0, 1).split(micro_batch) if micro_batch else ()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)

        def step() -> None:
            optimizer.zero_grad()
            if parts:
                losses = model.in_parts([lambda x=x: self.loss(model(x)) * (len(x) / per_task) for x in parts])
            else:
                features = model(self.images.flatten(0, 1)).split(per_task)
                losses = [self.loss(z) for z in features]
            torch.stack(losses).sum().backward()
            optimizer.step()

        return step


def precision(device: str) -> torch.autocast:
    """The context of every step; see `PRECISION`."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda")


def seconds(step: Callable[[], object], device: str) -> float:
    """Wall time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with precision(device):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(bench: Bench, device: str, repeats: int, micro_batch: int) -> dict[str, float]:
    """Median seconds of each kind of step, alternating."""
    steps = {kind: bench.step(kind, micro_batch) for kind in KINDS}
    times: dict[str, list[float]] = {name: [] for name in steps}
    with kept():  # as a run does
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                elapsed = seconds(step, device)
                if repeat:  # the first round warms up
                    times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(
    size: str, experts: int, per_task: int, device: str, kind: str, micro_batch: int, queue: "Queue[list[float]]"
) -> None:
    """Gigabytes: the peak of two steps, and what the libraries take."""
    libraries = peak(device)
    bench = Bench(size, experts, per_task, device)
    step = bench.step(kind, micro_batch)
    if kind != TRAINING:
        bench.tower = nn.Identity()  # type: ignore[assignment]  the merge shares its weights
    with precision(device):
        for _ in range(2):
            step()
    queue.put([peak(device), libraries])


def peak_of(*arguments: object) -> list[float]:
    """As `peak_memory`, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue: Queue[list[float]] = context.Queue()
    worker = context.Process(target=peak_memory, args=(*arguments, queue))
    worker.start()
    found = queue.get()
    worker.join()
    return found


def peak(device: str) -> float:
    """Gigabytes that this process took at most so far: resident on the CPU, in torch's tensors on a GPU."""
    return (torch.cuda.max_memory_allocated() if device == "cuda" else peak_resident()) / 1e9


def peak_resident() -> int:
    """Highest resident set of this process in bytes; unlike getrusage, it does not start at the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def main() -> None:
    """Print the table, and the figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="ViT-B/32")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="per task")
    parser.add_argument("--micro-batch", type=int, help="images per micro-batch; default: a task's images")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure its peaks too")
    args = parser.parse_args()
    micro_batch = args.micro_batch or args.images

    times = ratios(Bench(args.size, args.experts, args.images, args.device), args.device, args.repeats, micro_batch)
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    title = f"{args.size}, K = {args.experts}, {args.images} images per task, {args.device}, {PRECISION[args.device]}"
    table = Table(title=title, caption=" ".join(f"{name}={value}" for name, value in malloc.items()))
    columns = ("", "seconds", "ratio", "to", *(("peak memory", "of it, libraries") if args.memory else ()))
    for name in columns:
        table.add_column(name, justify="left" if name in ("", "to") else "right")
    peaks = {}
    for name, value in times.items():
        memory = []
        if args.memory:
            peaks[name], libraries = peak_of(args.size, args.experts, args.images, args.device, name, micro_batch)
            memory = [f"{peaks[name]:.2f} GB", f"{libraries:.2f} GB"]
        shown = name.replace("micro-batches", f"micro-batches of {micro_batch}")
        table.add_row(shown, f"{value:.3g}", f"{value / times[KINDS[name]]:.3f}", KINDS[name], *memory)
    console = Console(width=160)
    console.print(table)
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "precision": PRECISION[args.device],
        "micro_batch": micro_batch,
        **malloc,
    }
    console.print(json.dumps({"seconds": times, "peak_gb": peaks, **machine}), soft_wrap=True)


if __name__ == "__main__":
    main()
