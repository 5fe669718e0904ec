"""Peak memory of RegMean over files: `python -m benchmarks.regmean_memory`.

Writes an expert of ViT-B/32's matrices and one set of Gram matrices, gives both eight names, and streams a merge by
RegMean in a process of its own. Experts are read tensor by tensor, and so are Grams: the peak should stay below three
experts and one set of Grams, however many experts there are. Blocks are alike: some of them are merged.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from adamerge import TaskVectors
from adamerge.merge import plan
from adamerge.observing import Observation
from adamerge.rules import RegMean
from adamerge.statistics import write_observation
from benchmarks.spectral import resident

K, WIDTH, BLOCKS = 8, 768, 12


def shapes() -> dict[str, tuple[int, int]]:
    """The matrices of the tower."""
    block = {f"{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
    block |= {"fc1.weight": (4 * WIDTH, WIDTH), "fc2.weight": (WIDTH, 4 * WIDTH)}
    return {f"blocks.{n}.{name}": shape for n in range(BLOCKS) for name, shape in block.items()}


def make(folder: Path) -> tuple[int, int]:
    """Write base, expert and Grams; bytes of an expert and of a set of Grams."""
    rng, grams, shared = torch.Generator().manual_seed(0), {}, {}
    for model in ("base", "task0"):
        tensors = {name: torch.randn(shape, generator=rng) / 50 for name, shape in shapes().items()}
        save_file(tensors, folder / f"{model}.safetensors")
    for name, (_, columns) in shapes().items():
        block, layer = name.removesuffix(".weight").rsplit(".", 1)
        if layer in "kv":
            shared[name] = f"{block}.q.weight"
        else:
            x = torch.randn(256, columns, generator=rng)
            grams[f"gram/{name}"] = x.T @ x / 256
    write_observation(Observation(grams, shared), folder / "statistics" / "task0.safetensors")
    for k in range(1, K):
        os.link(folder / "statistics" / "task0.safetensors", folder / "statistics" / f"task{k}.safetensors")
    return (folder / "task0.safetensors").stat().st_size, (folder / "statistics" / "task0.safetensors").stat().st_size


def stream(folder: Path, blocks: int) -> tuple[int, int, float]:
    """Merge some blocks; bytes at the peak before and after, and the seconds."""
    before, start = resident("VmHWM"), time.perf_counter()
    vectors = TaskVectors.open(
        folder / "base.safetensors", {f"task{k}": folder / "task0.safetensors" for k in range(K)}
    )
    state = plan(vectors, [RegMean(folder / "statistics")])
    for name in state:
        if int(name.split(".")[1]) < blocks:
            for _ in state.parts(name):
                pass
    return before, resident("VmHWM"), time.perf_counter() - start


def main() -> None:
    """Make, measure, say, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help=f"to merge, of {BLOCKS}; default: 2")
    parser.add_argument("--folder", type=Path, help="where to put 1.2 GB of files; a temporary folder by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        expert, grams = make(Path(name))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            before, peak, took = pool.submit(stream, Path(name), given.blocks).result()
    bound = 3 * expert + grams
    console = Console(width=120)
    console.print(f"RegMean, {K} experts of {expert / 1e6:.0f} MB, Grams of {grams / 1e6:.0f} MB each: {took:.0f} s")
    console.print(
        f"peak {peak / 1e6:.0f} MB, {before / 1e6:.0f} of them before the merge; three experts and one set of Grams: "
        f"{bound / 1e6:.0f} MB; ratio {peak / bound:.2f}"
    )


if __name__ == "__main__":
    main()
