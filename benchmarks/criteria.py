"""Do criteria without labels rank methods as accuracy does? `python -m benchmarks.criteria runs/compare`.

Asks every run of a finished comparison (`trainers.compare`), and the merges without adaptation, what
`trainers.recommend` asks its short runs, and prints Spearman's rank correlation of each criterion with true accuracy.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torchmetrics.functional import spearman_corrcoef

from trainers import Adaptation
from trainers.judging import Criteria, Judge

#: Criteria and accuracy, by task, of one model.
Model = tuple[Criteria, Mapping[str, float]]


def main(args: Sequence[str] | None = None) -> None:
    """Print the correlations, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comparison", type=Path, help="the --output of a comparison")
    parser.add_argument("--images", type=int, default=256, help="of each task; default: 256")
    given = parser.parse_args(args)
    by_seed: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(given.comparison.glob("runs/*/seed*/results.json")):
        if path.parent.name.removeprefix("seed").isdigit():  # and no attempt that was moved aside
            by_seed[path.parent.name].append(path.parent)
    if not by_seed:
        sys.exit(f"error: no finished run under {given.comparison / 'runs'}")
    for seed, folders in by_seed.items():
        show(seed, models(folders, given.images))


def models(folders: Sequence[Path], images: int) -> list[Model]:
    """Every adapted model of one seed, then the merges without adaptation."""
    judge, found = None, list[Model]()
    for folder in folders:
        more = {} if judge is None else {"suite": judge.suite}
        run = Adaptation.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", map_location="cpu", **more)
        judge = judge or Judge(run.suite, images=images)
        answers = judge.ask(run)
        found.append((judge.criteria(answers, answers), accuracies(folder)["this run, adapted"]))
    assert judge is not None
    reached = accuracies(folders[0])
    static = [(judge.criteria(own, own), reached[name]) for name, own in judge.ask_static().items()]
    return [*found, *static]


def accuracies(folder: Path) -> dict[str, dict[str, float]]:
    """By row and task, as the run left them."""
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    return {row["method"]: row["accuracy"] for row in rows}


def correlations(found: Sequence[Model]) -> dict[str, tuple[float, float]]:
    """By criterion: the rank correlation of the averages over tasks, and the mean of those within each task."""
    scores: dict[str, tuple[float, float]] = {}
    for name in found[0][0]:
        by_task = [
            spearman([criteria[name][task] for criteria, _ in found], [accuracy[task] for _, accuracy in found])
            for task in found[0][1]
        ]
        averages = [(statistics.fmean(c[name].values()), statistics.fmean(a.values())) for c, a in found]
        scores[name] = spearman(*map(list, zip(*averages, strict=True))), statistics.fmean(by_task)
    return scores


def spearman(first: list[float], second: list[float]) -> float:
    """Rank correlation; equal values share a rank."""
    return float(spearman_corrcoef(torch.tensor(first), torch.tensor(second)))


def show(seed: str, found: Sequence[Model]) -> None:
    """One seed's table."""
    table = Table("criterion", "rank correlation", "mean within tasks", title=f"{seed}: {len(found)} models")
    for name, (average, within) in correlations(found).items():
        if name != "stability":  # which takes two runs
            table.add_row(name, f"{average:.2f}", f"{within:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
