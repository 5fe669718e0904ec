"""Spectral rules against the decompositions they cannot avoid: `python -m benchmarks.spectral --model B/32`.

Merges one matrix of every shape that a block of ViT-B/32 or L/14 has (queries, keys, values and outputs are alike, and
so is every block) for eight experts in float32, in memory, and multiplies by how often the model has it. What a rule
cannot avoid is so many calls of `torch.linalg.svd` on one expert's matrix, in float32, timed in the same round. Peak
memory is what the process takes beyond the experts' matrices, for the largest one.
"""

import argparse
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from adamerge import TaskVectors, merge
from adamerge.rules import (
    Cart,
    Doge,
    Drm,
    ElectSign,
    IsoC,
    IsoCts,
    KnOts,
    LoRe,
    Mean,
    Opcm,
    Star,
    Stf,
    Svc,
    TaskArithmetic,
    Trim,
    TruncatedSVD,
    TsvM,
    Wudi,
)

K = 8
STATUS = Path("/proc/self/status")
#: By model: its width, blocks.
MODELS = {"B/32": (768, 12), "L/14": (1024, 24)}
#: By name: the rules, and how many decompositions of one expert's matrix they cannot avoid. Descents and turns are cut
#: short: their time is that of their steps.
RULES: dict[str, tuple[list, int]] = {  # type: ignore[type-arg]
    "Iso-C": ([IsoC()], 1),
    "TSV-M": ([TsvM()], K + 2),
    "Iso-CTS": ([IsoCts()], K + 3),
    "CART": ([Cart()], K),
    "STAR": ([Star(), Mean()], K),
    "truncated SVD, rank 0.2": ([TruncatedSVD(0.2), TaskArithmetic()], K),
    "STF": ([Stf()], K),
    "SVC on task arithmetic": ([TaskArithmetic(), Svc()], 1),
    "OPCM": ([Opcm(rescale=False)], K - 1),
    "LoRE, 1 of 20 turns": ([LoRe(steps=1)], K),
    "KnOTS with TIES": ([KnOts([Trim(0.2), ElectSign("mean")])], 0),
    "DRM": ([Drm()], 0),
    "WUDI, closed form": ([Wudi(ridge=0.1)], 0),
    "WUDI, 30 of 300 steps": ([Wudi(steps=30)], 0),
    "DOGE, 40 of 400 steps": ([Doge(steps=40)], K + 1),
}


def shapes(width: int, blocks: int) -> dict[tuple[int, int], int]:
    """The shapes of a vision tower's matrices, and how many there are."""
    return {(width, width): 4 * blocks, (4 * width, width): blocks, (width, 4 * width): blocks}


def experts(shape: tuple[int, int], device: str) -> TaskVectors:
    """Eight experts of one matrix: noise, and some directions that all share."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(K, *shape, generator=rng)
    common = torch.randn(shape[0], 8, generator=rng) @ torch.randn(8, shape[1], generator=rng)
    deltas = (1e-3 * (noise + common)).to(device)
    base = (0.03 * torch.randn(shape, generator=rng)).to(device)
    return TaskVectors({"w": base}, {"w": deltas}, tuple(f"task{k}" for k in range(K)), fingerprints={})


def measure(step: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds of a call, and MB that it takes beyond what was there at its peak: nan where the system does not tell."""
    reset = Path("/proc/self/clear_refs")
    tells = STATUS.exists() and reset.exists()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    elif tells:
        reset.write_text("5")  # the peak is the present from here on
        before = resident("VmRSS")
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    if device == "cuda":
        return took, (torch.cuda.max_memory_allocated() - before) / 1e6
    return took, (resident("VmHWM") - before) / 1e6 if tells else float("nan")


def resident(what: str) -> int:
    """Bytes in memory, "VmRSS" now and "VmHWM" at the peak, as Linux counts them."""
    return int(re.findall(rf"{what}:\s+(\d+) kB", STATUS.read_text())[0]) * 1024


def measured(sizes: dict[tuple[int, int], int], rounds: int, device: str, names: Sequence[str]) -> Table:
    """A row for each rule."""
    pools = {shape: experts(shape, device) for shape in sizes}
    svd = {}
    for shape, pool in pools.items():
        tall = pool.deltas["w"][0] if shape[0] >= shape[1] else pool.deltas["w"][0].T.contiguous()
        one = lambda matrix=tall: torch.linalg.svd(matrix, full_matrices=False)  # noqa: E731
        svd[shape] = min(measure(one, device)[0] for _ in range(rounds + 2))
    table = Table(title=f"K = {K}; a decomposition takes " + ", ".join(f"{t:.2f} s of {s}" for s, t in svd.items()))
    for column in ("rule", "seconds", "SVDs it needs", "ratio", "of square ones", "extra memory"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for name in names:
        rules, count = RULES[name]
        times, most = {}, 0.0
        for shape, pool in pools.items():
            step = lambda pool=pool, rules=rules: merge(pool, rules)  # noqa: E731
            found = [measure(step, device) for _ in range(rounds)]
            times[shape] = min(took for took, _ in found)
            most = max(most, *(megabytes for _, megabytes in found))
        total = sum(sizes[shape] * each for shape, each in times.items())
        floor = count * sum(sizes[shape] * each for shape, each in svd.items())
        square = next(iter(sizes))
        ratios = [f"{total / floor:.2f}", f"{times[square] / (count * svd[square]):.2f}"] if count else ["–", "–"]
        table.add_row(name, f"{total:.1f}", str(count or "–"), *ratios, f"{most:.0f} MB")
    return table


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="B/32")
    parser.add_argument("--rounds", type=int, default=1, help="of which the fastest counts; default: 1")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(args)
    width, blocks = MODELS[given.model]
    sizes = shapes(given.width or width, blocks)
    console = Console(width=120)
    console.print(measured(sizes, given.rounds, given.device, given.rules))
    console.print(
        f"Seconds are those of one matrix of each shape, times {', '.join(map(str, sizes.values()))}, as many as the "
        f"{blocks} blocks of ViT-{given.model} have. {torch.get_num_threads()} threads, torch {torch.__version__}."
    )


if __name__ == "__main__":
    main()
