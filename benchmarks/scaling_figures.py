"""How a step grows with experts, parameters, images and processes: `python -m benchmarks.scaling_figures`.

Every point is a process of its own: seconds of an AdaMerging step and of a training step on the same images (medians of
three to nine, in turns), and the adaptation's peak memory, on the CPU in float32. Points go to `figures/scaling.json`
with the machine and the day, curves to `figures/*.png`, which say what stays the same; `--only` measures some of the
axes again and keeps what is there of the others.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from adamerge import TaskVectors
from adamerge.drawing import save, style
from adamerge.rules import Store
from benchmarks.adaptation_step import ADAPTATION, SIZES, TRAINING, Bench, peak_resident, seconds
from benchmarks.scaling import in_turns
from modules import Coefficients, MergedModel

FIGURES = Path(__file__).with_name("figures")
#: Hidden size, size of an MLP, blocks, heads and patch of vision transformers of about 1, 8, 30, 90 and 300 million.
SIZES |= {
    name: dict(zip(SIZES["tiny"], values, strict=True))
    for name, values in {
        "1M": (128, 512, 4, 2, 32), "8M": (384, 1536, 4, 6, 32), "30M": (768, 3072, 4, 12, 32),
        "90M": (768, 3072, 12, 12, 32), "300M": (1024, 4096, 24, 16, 32),
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What is measured at once; `images` over all tasks and processes."""

    size: str = "8M"
    experts: int = 8
    images: int = 16
    processes: int = 1


AXES = {
    "experts": [Point(experts=count) for count in (2, 4, 8, 16, 32, 64)],
    "parameters": [Point(size=size, experts=2, images=8) for size in ("1M", "8M", "30M", "90M", "300M")],
    "images": [Point(size="1M", images=count) for count in (16, 32, 64, 128, 256, 512)],
    "processes": [Point(experts=32, images=32, processes=count) for count in (1, 2)],
}
LABELS = {
    "experts": "experts (K)",
    "parameters": "parameters (P)",
    "images": "images a step",
    "processes": "processes",
}


def measure(point: Point, rank: int, meeting: str, queue: "Queue[dict[str, float]]") -> None:
    """One process of a point: seconds and the peak resident memory in GB, beyond what was there before."""
    if point.processes > 1:
        torch.set_num_threads(1)
        where = f"file://{meeting}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=point.processes)
    libraries = peak_resident()
    bench = Bench(point.size, 1, point.images // point.processes, "cpu")
    base = {name: value.detach() for name, value in bench.tower.state_dict().items()}
    floats = {name: value for name, value in base.items() if value.is_floating_point()}

    def noise(name: str, _: Any) -> torch.Tensor:
        return torch.randn(point.experts, *base[name].shape, generator=torch.Generator().manual_seed(0)) / 1000

    empty = {name: torch.zeros(()).expand(point.experts, *value.shape) for name, value in floats.items()}
    tasks = tuple(f"task{k}" for k in range(point.experts))
    if point.processes == 1:
        vectors = TaskVectors(base, empty, tasks, fingerprints={}).changed(noise)
    else:
        store = Store("same", "processes")
        vectors = TaskVectors(base, empty, tasks, fingerprints={}).changed(
            lambda name, deltas: store.stored(name, noise(name, deltas), base[name])
        )
    model = MergedModel(bench.tower, vectors, Coefficients()).requires_grad_(True)
    adapt = bench.adaptation_step(model, 0)
    adapt()
    once = seconds(adapt, "cpu")
    peak = peak_resident() - libraries
    times = in_turns({ADAPTATION: adapt, TRAINING: bench.training_step()}, "cpu", max(3, min(9, int(4 / once))))
    count = sum(value.numel() for value in base.values())
    queue.put({**times, "gigabytes": peak / 1e9, "parameters": count})
    if point.processes > 1:
        dist.destroy_process_group()


def measured(point: Point) -> dict[str, float]:
    """The largest of what its processes say."""
    context = multiprocessing.get_context("spawn")
    queue: Queue[dict[str, float]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(point, rank, f"{folder}/meeting", queue) for rank in range(point.processes)]
        workers = [context.Process(target=measure, args=each) for each in arguments]
        for worker in workers:
            worker.start()
        found = [queue.get() for _ in workers]
        for worker in workers:
            worker.join()
    return {**asdict(point), **{name: max(each[name] for each in found) for name in found[0]}}


def draw(axis: str, points: list[dict[str, Any]]) -> None:
    """Seconds on the left, memory on the right; the title has what is the same at all points."""
    places = [point[axis] for point in points]
    names = [f"{place / 1e6:.0f} M" if axis == "parameters" else f"{place}" for place in places]
    if axis == "experts":  # no name beside another
        names = [
            name if place - before > places[-1] / 20 else ""
            for name, place, before in zip(names, places, [-places[-1], *places[:-1]], strict=True)
        ]
    growing = axis in ("parameters", "images")  # over orders of magnitude, in proportion: a line on two such axes
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        for name in (ADAPTATION, TRAINING):
            left.plot(places, [point[name] for point in points], marker="o", label=name)
        right.plot(places, [point["gigabytes"] for point in points], marker="o", label=ADAPTATION)
        for axes, label in ((left, "seconds"), (right, "GB per process, at the peak")):
            axes.set(xlabel=LABELS[axis], ylabel=label)
            if growing:
                axes.set(xscale="log", yscale="log")
                axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
            else:
                axes.set(ylim=(0, None))
            axes.set_xticks(places, names)
            axes.minorticks_off()
            axes.legend(frameon=False)
        figure.suptitle(title(axis, points), fontsize=9)
        save(figure, FIGURES / f"{axis}.png")
        plt.close(figure)


def title(axis: str, points: list[dict[str, Any]]) -> str:
    """What is the same at all points of an axis, and where and when they were measured."""
    shown = {
        "experts": lambda point: f"K = {point['experts']} experts",
        "parameters": lambda point: f"P = {point['parameters'] / 1e6:.1f} M parameters",
        "images": lambda point: f"{point['images']} images a step",
        "processes": lambda point: "1 process" if point["processes"] == 1 else f"{point['processes']} processes",
    }
    fixed = [words(points[0]) for name, words in shown.items() if name != axis]
    where = [points[0].get("machine", ""), points[0].get("date", "")]
    return "\n".join(", ".join(filter(None, line)) for line in (fixed, where) if any(line))


def machine() -> dict[str, str]:
    """Where and when a point is measured."""
    return {
        "machine": f"{os.cpu_count()} CPU cores, float32, torch {torch.__version__}",
        "date": f"{date.today():%d %B %Y}",
    }


def main() -> None:
    """Measure the axes that are asked for, and draw all that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=AXES, default=list(AXES))
    FIGURES.mkdir(exist_ok=True)
    file = FIGURES / "scaling.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for axis in parser.parse_args().only:
        found[axis] = [{**measured(point), **machine()} for point in AXES[axis]]
        file.write_text(json.dumps(found, indent=1) + "\n")
    for axis, points in found.items():
        draw(axis, points)


if __name__ == "__main__":
    main()
