"""Whether the cost model picks the fastest composition of routed layers: `python -m benchmarks.compositions`.

For several shapes, a forward and a backward pass of one layer in every way that can be taken, alternating, beside what
`adamerge.routed.costs` says of them; both relative to `materialise`. The last column is the time of the way that is
picked over that of the fastest one.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adamerge.compositions import Composition, routed_product
from adamerge.deltas import AnyDeltas, LowRank, Sparse
from adamerge.routed import costs


class Shape(NamedTuple):
    """A routed layer and its batch; rank 0 is dense, `kept` the fraction of entries of sparse deltas."""

    groups: int
    rows: int
    experts: int
    into: int = 768
    out: int = 3072
    rank: int = 0
    kept: float = 1.0


SHAPES = (
    Shape(32, 50, 8),
    Shape(32, 50, 8, 3072, 768),
    *(Shape(32, rows, 8) for rows in (1, 2, 4, 8, 16, 200)),
    *(Shape(groups, 50, 8) for groups in (1, 2, 4)),
    *(Shape(32, rows, 2) for rows in (1, 4, 50)),
    *(Shape(16, rows, 64) for rows in (1, 4, 50)),
    *(Shape(32, 50, 8, rank=rank) for rank in (16, 64, 256)),
    *(Shape(16, rows, 8, 768, 768, rank=128) for rows in (50, 400)),
    *(Shape(32, rows, 8, kept=0.1) for rows in (1, 50)),
)


def times(shape: Shape, repeats: int, device: str) -> tuple[dict[Composition, float], dict[Composition, float]]:
    """Median seconds of a forward and a backward pass by way, and what the model says."""
    torch.manual_seed(0)
    x = torch.randn(shape.groups, shape.rows, shape.into, device=device, requires_grad=True)
    routing = torch.rand(shape.groups, shape.experts, device=device, requires_grad=True)
    matrix = torch.randn(shape.out, shape.into, device=device)
    deltas = _deltas(shape, device)
    predicted = costs(shape.groups, shape.rows, matrix, deltas, backward=True)
    grad = torch.randn(shape.groups, shape.rows, shape.out, device=device)
    measured: dict[Composition, list[float]] = {way: [] for way in predicted}
    for repeat, way in itertools.product(range(repeats + 1), predicted):
        _wait(device)
        start = time.perf_counter()
        routed_product(x, routing, matrix, deltas, False, way).backward(grad)
        _wait(device)
        if repeat:  # the first round warms up
            measured[way].append(time.perf_counter() - start)
    return {way: statistics.median(values) for way, values in measured.items()}, predicted


def _deltas(shape: Shape, device: str) -> AnyDeltas:
    def random(*sizes: int) -> Tensor:
        return torch.empty(shape.experts, *sizes, device=device).normal_(0, 1e-3)

    if shape.rank:
        return LowRank(random(shape.out, shape.rank), random(shape.rank, shape.into))
    deltas = random(shape.out, shape.into)
    if shape.kept == 1:
        return deltas
    return Sparse.from_dense(deltas * (torch.rand_like(deltas) < shape.kept))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and the figures as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--first", type=int, default=len(SHAPES), help="how many of the shapes")
    args = parser.parse_args(argv)

    table = Table(title=f"forward and backward pass of one layer, {args.device}, float32; predicted in brackets")
    for name in ("groups × rows", "K", "in → out", "deltas", "materialise", "expand", "factorise", "picked", "loss"):
        table.add_column(name, justify="right")
    figures = []
    for shape in SHAPES[: args.first]:
        seconds, predicted = times(shape, args.repeats, args.device)
        picked = min(predicted, key=predicted.__getitem__)
        loss = seconds[picked] / min(seconds.values())
        form = f"rank {shape.rank}" if shape.rank else "dense" if shape.kept == 1 else f"{shape.kept:.0%} kept"
        base, model = seconds["materialise"], predicted["materialise"]
        cells = [f"{base * 1e3:.0f} ms"]
        for way in ("expand", "factorise"):
            known = way in seconds
            cells.append(f"{seconds[way] / base:.2f} ({predicted[way] / model:.2f})" if known else "–")
        sizes = (f"{shape.groups} × {shape.rows}", str(shape.experts), f"{shape.into} → {shape.out}", form)
        table.add_row(*sizes, *cells, picked, f"{loss:.2f}")
        figures.append({**shape._asdict(), "seconds": seconds, "picked": picked, "loss": loss})
    console = Console(width=120)
    console.print(table)
    console.print(json.dumps({"shapes": figures, "threads": torch.get_num_threads()}), soft_wrap=True)


if __name__ == "__main__":
    main()
