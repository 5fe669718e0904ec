"""Time and memory of a static merge of large experts: `python -m benchmarks.static_merge --parameters 2e9`.

Makes a base and experts of transformer-like shapes in bfloat16 shards, merges them in a process of its own (by TIES
with a global threshold, which reads them three times, and by task arithmetic, which reads them once), and compares its
time with that of reading the files as often as the rule needs, in the same way, and writing as much as the merge. Files
are dropped from the page cache before each of the two, and deleted at the end.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from rich.console import Console
from torch import Tensor

from adamerge.checkpoints import meta, open_state, rows_of
from adamerge.differences import pieces
from adamerge.preflight import passes
from adamerge.recipes import read as read_recipe
from adamerge.tensor_files import header
from adamerge.threads import in_order
from adamerge.writing import layout

VOCABULARY, SHARD = 32_000, 10**9
PYTHON = (sys.executable, "-m")
RULES = {
    "TIES with global trim": [{"Trim": {"keep": 0.2}}, {"ElectSign": {"combine": "mean"}}],
    "task arithmetic": ["TaskArithmetic"],
}


def shapes(parameters: float) -> dict[str, Tensor]:
    """Tensors of a decoder of about that many parameters, without data."""
    width = 128 * max(1, round((5 * parameters) ** (1 / 3) / 128))
    inner = 128 * round(width * 8 / 3 / 128)
    block = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
    block |= {f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    block |= {"mlp.down_proj.weight": (width, inner), "input_layernorm.weight": (width,)}
    vocabulary = min(VOCABULARY, int(parameters / 20 / width))
    blocks = max(1, round((parameters - 2 * vocabulary * width) / sum(map(math.prod, block.values()))))
    every = {f"model.layers.{n}.{name}": shape for n in range(blocks) for name, shape in block.items()}
    every = {"model.embed_tokens.weight": (vocabulary, width), **every, "lm_head.weight": (vocabulary, width)}
    return {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in every.items()}


def make(folder: Path, tensors: dict[str, Tensor], expert: int) -> None:
    """Write one model; expert 0 is the base. Noise is cut from one block, at an offset of its own for each tensor."""
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    block = torch.randn(2**22, generator=rng)
    files = layout(tensors, SHARD)
    for file, shard in files.items():
        with (folder / file).open("wb") as out:
            out.write(header(shard, {"format": "pt"}))
            for n, (_, like) in enumerate(shard.items()):
                for rows in pieces(like.shape):
                    count = like[rows].numel() if rows else like.numel()
                    start, scale = (rows.start if rows else 0) * 7919 + n * 104_729, 0.5 + n % 7 / 7
                    value = 0.02 * cut(block, start, count)
                    if expert:
                        value = value + 1e-3 * scale * cut(block, start + expert * 15_485_863, count)
                    out.write(value.bfloat16().view(torch.uint8).numpy().data)
    index = {"metadata": {}, "weight_map": {name: file for file, shard in files.items() for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(block: Tensor, start: int, count: int) -> Tensor:
    """`count` values of the block, from about `start` on."""
    if count >= len(block):
        return block.repeat(-(-count // len(block)))[:count]
    start %= len(block) - count
    return block[start : start + count]


def forget(folder: Path) -> None:
    """Drop files from the page cache."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as open_file:
            os.fsync(open_file.fileno())
            os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(recipe: Path, output: Path) -> None:
    """Read what the recipe's merge reads, as often, and write as much as it writes."""
    job = read_recipe(recipe)
    states = [open_state(path) for path in job.sources.values()]

    def parts() -> Iterator[tuple[str, slice | None]]:
        return ((name, rows) for name in states[0] for rows in pieces(meta(states[0], name).shape))

    def fetch(part: tuple[str, slice | None]) -> Tensor:
        name, rows = part
        read = [state[name] if rows is None else rows_of(state, name, rows) for state in states]
        return read[0]

    for _ in range(passes(job)):
        for _ in in_order(fetch, parts()):
            pass
    with output.open("wb") as out:
        for tensor in in_order(fetch, parts()):
            out.write(tensor.view(-1).view(torch.uint8).numpy().data)


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory, in GB, of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    """Make, measure by each rule, say, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=2e8)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--folder", type=Path, help="where to put the files; a temporary folder by default")
    parser.add_argument("--copy", type=Path, nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.copy:
        copy(*asked.copy)
        return
    tensors = shapes(asked.parameters)
    count = sum(like.numel() for like in tensors.values())
    console = Console(width=120)
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < 2 * count * (asked.experts + 3):
            sys.exit(f"{folder} has too little space for {asked.experts + 3} models of {2 * count / 1e9:.1f} GB")
        for n in range(asked.experts + 1):
            make(folder / f"model{n}", tensors, n)
        experts = {f"task{n}": f"model{n}" for n in range(1, asked.experts + 1)}
        console.print(f"{asked.experts} experts of {count / 1e9:.2f} billion parameters, bfloat16")
        recipe = folder / "recipe.yaml"
        for rule in asked.rules:
            job = {"base": "model0", "experts": experts, "rules": RULES[rule], "scale": 1.0}
            recipe.write_text(yaml.safe_dump(job))
            forget(folder)
            plain, _ = measure([*PYTHON, "benchmarks.static_merge", "--copy", str(recipe), str(folder / "copy")])
            (folder / "copy").unlink()
            forget(folder)
            merging, peak = measure([*PYTHON, "adamerge", "merge", str(recipe), "--output", str(folder / "merged")])
            shutil.rmtree(folder / "merged")
            console.print(f"{rule}: {merging:.1f} s, peak {peak:.2f} GB resident")
            console.print(f"reading as often and writing as much: {plain:.1f} s; ratio {merging / plain:.2f}")


if __name__ == "__main__":
    main()
