"""Accuracy on streams as they come: `python -m benchmarks.streams --output runs/streams --steps 250`.

Every cell is a stream, a method and a guard or none: a run of its own in this process, which leaves a JSON file; a cell
whose file is there is not run again. Online streams are scored as they pass, each image predicted, then adapted on,
and, in the second table, by the model that they end with.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from typing import Any

from adamerge.corruptions import SEVEN
from adamerge.files import write_text
from trainers.cli import main as train

METHODS = ("adamerging", "wemoe", "surgery", "tint", "twin")


def passing(order: str) -> dict[str, Any]:
    """The settings of a stream that passes once."""
    return {"order": {"class_path": f"trainers.{order}"}, "tasks_per_step": None}


#: By name, what is set beyond the method.
STREAMS: dict[str, dict[str, Any]] = {
    "offline": {},
    "online": passing("Shuffled"),
    "task blocks": passing("TaskBlocks"),
    "class-correlated": passing("ClassCorrelated"),
    "unseen tasks": {"tasks": None},  # those that `--seen` names
    "task unknown": {**passing("Shuffled"), "task_known": False},
    **{
        f"corrupted {kind.__name__}": {
            **passing("Shuffled"),
            "corruptions": [{"class_path": f"adamerge.corruptions.{kind.__name__}", "init_args": {"severity": 3}}],
        }
        for kind in SEVEN
    },
}
GUARD = '[{"class_path": "trainers.Guard", "init_args": {"keep": "agreement"}}]'


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250, help="at most, of each run; default: 250, one pass of Mini")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", default="configs/suites/mini.yaml", help="an overlay")
    parser.add_argument(
        "--seen", nargs="+", default=["digits", "letters", "signs", "icons"], help="tasks that come where others do not"
    )
    parser.add_argument("--streams", nargs="*", default=list(STREAMS), choices=list(STREAMS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--guards", nargs="*", default=["none", "guard"], choices=["none", "guard"])
    parser.add_argument("--tables", action="store_true", help="print what is there, and run nothing")
    parser.add_argument("arguments", nargs="*", help="after --, for every run, such as the suite's seed")
    given = parser.parse_args(args)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for stream, guard, method in product([] if given.tables else given.streams, given.guards, given.methods):
        cell = given.output / name(stream, method, guard, given.seed)
        if not (cell / "cell.json").is_file():
            run(cell, stream, method, guard, given)
    show(given.output, given.seed)


def run(cell: Path, stream: str, method: str, guard: str, given: argparse.Namespace) -> None:
    """One cell."""
    data = settings(stream, method) | ({"tasks": given.seen} if "tasks" in STREAMS[stream] else {})
    known = data.get("task_known", True)
    command = ["fit", f"--config={given.suite}", f"--config=configs/methods/{method}.yaml", f"--root={cell}"]
    command += [f"--trainer.max_steps={given.steps}", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    command += [f"--seed_everything={given.seed}", f"--data.init_args.seed={given.seed}", "--report.figures=false"]
    command += ["--trainer.enable_progress_bar=false"]
    command += [f"--data.init_args.{field}={json.dumps(value)}" for field, value in data.items()]
    if not known:
        command += ["--model.init_args.task_id=inferred", "--model.init_args.finder=trainers.ByEntropy"]
    if guard == "guard":
        command += [f"--trainer.callbacks={GUARD}"]
    began = time.monotonic()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        train([*command, *given.arguments])
    results = json.loads((cell / "run" / "results.json").read_text())
    rows = {row["method"]: row["accuracy"] for row in results["rows"]}
    kept = {row: rows[row] for row in rows if row.startswith(("this run", "task arithmetic", "experts"))}
    seconds = round(time.monotonic() - began, 1)
    more = {what: results.get(what) for what in ("steps", "guards", "unseen_tasks")}
    write_text(cell / "cell.json", json.dumps({"stream": stream, "rows": kept, "seconds": seconds, **more}))
    _say(f"{cell.name}: {seconds} s")


def settings(stream: str, method: str) -> dict[str, Any]:
    """The arguments of the stream; a router that learns from training images adapts on them, whatever comes."""
    if method != "twin":
        return STREAMS[stream]
    return {field: value for field, value in STREAMS[stream].items() if field in ("tasks", "corruptions")}


def name(stream: str, method: str, guard: str, seed: int) -> str:
    """The folder of a cell; streams that are the same to a method share one."""
    same = next(each for each in STREAMS if settings(each, method) == settings(stream, method))
    return f"{same} {method} {guard} {seed}".replace(" ", "_")


def show(folder: Path, seed: int) -> None:
    """Average accuracy in %, stream by stream; of the seven corruptions, their mean."""
    names = list(dict.fromkeys(each.split()[0] if each.startswith("corr") else each for each in STREAMS))
    for title, row in (("as it passes", "this run, online"), ("at the end", "this run, adapted")):
        _say(f"\n{title}\n| stream | start | " + " | ".join(f"{m} | guarded" for m in METHODS) + " |")
        _say("|---" + "|---:" * (1 + 2 * len(METHODS)) + "|")
        for each in names:
            start = _mean(folder, each, "adamerging", "none", seed, "this run, start")
            cells = [_mean(folder, each, m, g, seed, row) for m in METHODS for g in ("none", "guard")]
            _say("| " + " | ".join([each, start, *cells]) + " |")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _mean(folder: Path, stream: str, method: str, guard: str, seed: int, row: str) -> str:
    found = list(_scores(folder, stream, method, guard, seed, row))
    return f"{statistics.fmean(found):.1f}" if found else "–"


def _scores(folder: Path, stream: str, method: str, guard: str, seed: int, row: str) -> Iterator[float]:
    for each in STREAMS:
        path = folder / name(each, method, guard, seed) / "cell.json"
        if each.split()[0 : len(stream.split())] == stream.split() and path.is_file():
            rows = json.loads(path.read_text())["rows"]
            scores = rows.get(row, rows["this run, adapted"] if row.endswith("online") else {})
            if scores:
                yield 100 * statistics.fmean(scores.values())


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main()
