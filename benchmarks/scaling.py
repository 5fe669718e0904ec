"""What merging adds to a step, to memory, to evaluation and to starting up: `python -m benchmarks.scaling`.

Each figure is a ratio to something measured in the same run, in turns. On a GPU, steps run in bfloat16 autocast. What
`--only` names is measured:

- step: a layer-wise AdaMerging step, an ordinary training step on the same images, and a straightforward
  implementation (weights are a sum of products that autograd sees; one forward and one backward pass per task);
- experts: seconds that one more expert adds to a step, over reading its deltas twice;
- storage: bytes and seconds of a step with deltas in fewer bits, sparse, of low rank, in host memory or on disk;
- memory: the peak of a step in micro-batches, over the sum of what it needs;
- large: the peak and the seconds of a step with 64 experts in 8 bits (of ViT-L/14, 20 GB), on two images with the CPU,
  an image of each task with a GPU; `--place` says where they are;
- evaluation: images per second of a static merge, over those of the plain model;
- start: `train.py --help` and the first step of `fit`, beside the import of torch and lightning.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from adamerge import TaskVectors
from adamerge.deltas import AnyDeltas, Sparse
from adamerge.memory import kept
from adamerge.rules import Store
from benchmarks.adaptation_step import (
    ADAPTATION,
    IN_PARTS,
    PRECISION,
    RANK,
    SIZES,
    TRAINING,
    Bench,
    peak,
    precision,
    seconds,
)
from benchmarks.start import start
from modules import Coefficients, MergedModel

NAIVE = "straightforward"
EXPERTS = (2, 4, 8, 16, 32, 64)


def in_turns(
    steps: dict[str, Callable[[], object]], device: str, repeats: int, processor: dict[str, float] | None = None
) -> dict[str, float]:
    """Median seconds of each step, in turns, after a round that warms up; `processor` takes those of the processor."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    with kept():  # as a run does
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                busy = time.process_time()
                elapsed = seconds(step, device)
                if repeat:
                    times[name].append((elapsed, time.process_time() - busy))
    if processor is not None:
        processor |= {name: statistics.median(busy for _, busy in values) for name, values in times.items()}
    return {name: statistics.median(wall for wall, _ in values) for name, values in times.items()}


def straightforward(bench: Bench, deltas: dict[str, Tensor]) -> Callable[[], None]:
    """A step as one would write it down: autograd goes through the sum of products, once for every task."""
    base = {name: value.detach() for name, value in bench.tower.state_dict().items()}
    coefficients = nn.Parameter(torch.full((len(deltas), len(bench.tasks)), 0.3, device=bench.images.device))
    optimizer = torch.optim.Adam([coefficients], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        weights = dict(base)
        for row, (name, delta) in zip(coefficients, deltas.items(), strict=True):
            weights[name] = base[name] + sum(value * tau for value, tau in zip(row, delta, strict=True))
        for images in bench.images:
            bench.loss(functional_call(bench.tower, weights, (images,))).backward(retain_graph=True)
        optimizer.step()

    return step


def step(args: argparse.Namespace) -> dict[str, float]:
    """Ratios of the adaptation step to a training step and to a straightforward one."""
    bench = Bench(args.size, args.experts, args.images, args.device)
    model = bench.merged(ADAPTATION)
    deltas = {name: delta for name in model.coefficients.rows if isinstance(delta := model.delta(name), Tensor)}
    steps = {
        TRAINING: bench.training_step(),
        ADAPTATION: bench.adaptation_step(model, 0),
        IN_PARTS: bench.adaptation_step(model, args.images),
        NAIVE: straightforward(bench, deltas),
    }
    busy: dict[str, float] = {}
    times = in_turns(dict(steps), args.device, args.repeats, busy)
    found = dict(times)
    for note, spent in (("", times), (", processor time", busy)):
        ratios = {name: value / spent[TRAINING] for name, value in spent.items() if name != TRAINING}
        found |= {f"{name} / {TRAINING}{note}": ratio for name, ratio in ratios.items()}
        found[f"{NAIVE} / {ADAPTATION}{note}"] = spent[NAIVE] / spent[ADAPTATION]
    return found


def experts(args: argparse.Namespace) -> dict[str, float]:
    """The slope of a step's seconds over K, by least squares, in units of reading one expert's deltas twice."""
    points, read = [], 0.0
    for count in EXPERTS:
        bench = Bench("small", count, 1, args.device)
        bench.images = bench.images[:1].repeat(2, 1, 1, 1, 1)  # two images, however many experts
        model = bench.merged(ADAPTATION)
        deltas = [delta for name in model.coefficients.rows if isinstance(delta := model.delta(name), Tensor)]
        steps = {"step": bench.adaptation_step(model, 0), "read": lambda deltas=deltas: [d.sum() for d in deltas]}
        times = in_turns(steps, args.device, 5 * args.repeats)
        points.append((count, times["step"]))
        read = times["read"] / count  # the last is the most exact
    mean_k, mean_s = (statistics.mean(values) for values in zip(*points, strict=True))
    slope = sum((k - mean_k) * (s - mean_s) for k, s in points) / sum((k - mean_k) ** 2 for k, _ in points)
    measured = {f"step, K = {count}": value for count, value in points}
    return {**measured, "seconds per expert": slope, "reading its deltas once": read, "ratio": slope / (2 * read)}


def storage(args: argparse.Namespace) -> dict[str, float]:
    """Bytes of deltas in each form and place, and seconds of a step with them."""
    bench, found = Bench("small", 32, 1, args.device), {}
    bench.images = bench.images[:1].repeat(2, 1, 1, 1, 1)
    steps: dict[str, Callable[[], object]] = {}
    for name, vectors in stored(bench, args.device):
        model = MergedModel(bench.tower, vectors, Coefficients()).requires_grad_(True)
        found[f"GB, {name}"] = sum(d.nbytes for n in model.coefficients.rows if (d := model.delta(n)) is not None) / 1e9
        steps[name] = bench.adaptation_step(model, 0)
    times = in_turns(steps, args.device, 5 * args.repeats)
    return {**found, **{f"step, {name}": value for name, value in times.items()}}


def stored(bench: Bench, device: str) -> Iterator[tuple[str, TaskVectors]]:
    """The same experts, and the name of how and where they are; of those in fewer numbers, others."""
    places = {"memory": "in memory", "disk": "on disk"} | ({"host": "in host memory"} if device == "cuda" else {})
    for place, where in places.items():
        for dtype in ("same", "bfloat16", "int8"):
            yield f"{dtype.replace('same', 'float32')} {where}", Store(dtype, place)(bench.dense)  # type: ignore[arg-type]

    def tenth(_: str, deltas: AnyDeltas) -> AnyDeltas:
        assert isinstance(deltas, Tensor)
        return Sparse.from_dense(deltas * (torch.rand_like(deltas) < 0.1))

    yield "sparse, a tenth of all numbers", bench.dense.changed(tenth)
    yield f"rank {RANK}", bench.factored


def memory(args: argparse.Namespace) -> dict[str, float]:
    """The peak of two steps in micro-batches, in a process of its own, over what they need."""
    context = multiprocessing.get_context("spawn")
    queue: Queue[dict[str, float]] = context.Queue()
    worker = context.Process(target=_memory, args=(args.size, args.experts, args.images, args.device, queue))
    worker.start()
    found = queue.get()
    worker.join()
    needed = sum(value for name, value in found.items() if name != "peak")
    return {**found, "needed": needed, "ratio": found["peak"] / needed}


def _memory(size: str, count: int, images: int, device: str, queue: "Queue[dict[str, float]]") -> None:
    parts = {"libraries": peak(device)}
    bench = Bench(size, count, images, device)
    model = bench.merged(ADAPTATION)
    weights = sum(value.nbytes for value in bench.tower.state_dict().values()) / 1e9
    bench.tower = nn.Identity()  # type: ignore[assignment]  the merge shares its weights
    parts |= {"weights": weights, "images": bench.images.nbytes / 1e9, "merged weights": weights, "gradients": weights}
    parts["deltas"] = sum(d.nbytes for name in model.coefficients.rows if (d := model.delta(name)) is not None) / 1e9
    run = bench.adaptation_step(model, images)
    with precision(device):
        for _ in range(2):
            run()
        parts["peak"] = peak(device)
        parts["activations"] = activations(model, bench.images[0]) / 1e9
    queue.put(parts)


def activations(model: nn.Module, images: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, without the weights."""
    sizes: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    weights = model.weights()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved), model.holding(weights):
        features = model(images)  # held until it is counted, so that no place is used twice
        known = {value.untyped_storage().data_ptr() for value in (images, *weights.values())}
        total = sum(size for place, size in sizes.items() if place not in known)
        del features
    return total


def large(args: argparse.Namespace) -> dict[str, float]:
    """Memory and seconds of a step with 64 experts that are stored in 8 bits.

    What the system keeps of files in memory, and drops where memory is short, counts as "mapped".
    """
    bench, store = Bench(args.size, EXPERTS[-1], 1, args.device), Store("int8", args.place)
    on_gpu, peaks = args.device == "cuda", dict[str, float]()
    bench.images = bench.images if on_gpu else bench.images[:2]
    with sampled(peaks):
        likes = {name: value for name, value in bench.base.items() if value.is_floating_point()}
        deltas = {name: store.stored(name, bench.random(*like.shape), like) for name, like in likes.items()}
        model = MergedModel(bench.tower, TaskVectors(bench.base, deltas, bench.tasks, fingerprints={}), Coefficients())
        if on_gpu:  # storing took float32 for a while
            torch.cuda.reset_peak_memory_stats()
        step = bench.adaptation_step(model.requires_grad_(True), 16 if on_gpu else 1)
        times = in_turns({"step": step}, args.device, 2)
    peaks |= {"on the GPU": peak("cuda")} if on_gpu else {}
    bytes_stored = sum(d.nbytes for name in model.coefficients.rows if (d := model.delta(name)) is not None)
    return {"GB of deltas": bytes_stored / 1e9, **{f"GB at the peak, {n}": v for n, v in peaks.items()}, **times}


@contextmanager
def sampled(peaks: dict[str, float]) -> Iterator[None]:
    """Within the block, the most memory in GB that the process's own pages take, and those of files (Linux)."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.05):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            for name, field in (("own", "RssAnon"), ("mapped", "RssFile"), ("both", "VmRSS")):
                peaks[name] = max(peaks.get(name, 0.0), int(status[field].split()[0]) * 1024 / 1e9)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def evaluation(args: argparse.Namespace) -> dict[str, float]:
    """Throughput of a merge in inference over that of the plain model."""
    bench = Bench(args.size, args.experts, args.images, args.device)
    model, bench.images = bench.merged(ADAPTATION), bench.images[: args.experts // 2]
    times = in_turns(
        {"plain": bench.inference(bench.tower), "merge": bench.inference(model)}, args.device, 2 * args.repeats
    )
    count = bench.images.flatten(0, 1).shape[0]
    speeds = {f"{name}, images/s": count / value for name, value in times.items()}
    return {**speeds, "ratio": times["plain"] / times["merge"]}


PARTS = {
    "step": step,
    "experts": experts,
    "storage": storage,
    "memory": memory,
    "large": large,
    "evaluation": evaluation,
    "start": lambda args: start(args.repeats),
}


def main() -> None:
    """Measure the parts that are asked for; print them, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[p for p in PARTS if p != "large"])
    parser.add_argument("--size", choices=SIZES, default="ViT-B/32")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="per task")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--place", choices=["memory", "host", "disk"], default="disk", help="of `large`")
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    console, found = Console(), {}
    for part in args.only:
        begun = time.perf_counter()
        found[part] = PARTS[part](args)
        title = f"{part}, {args.device}, {PRECISION[args.device]} ({time.perf_counter() - begun:.0f} s)"
        table = Table(title=title, show_header=False)
        for name, value in found[part].items():
            table.add_row(name, f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f}")
        console.print(table)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    console.print(json.dumps({**vars(args), **versions, **found}), soft_wrap=True)


if __name__ == "__main__":
    main()
