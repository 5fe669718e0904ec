"""Several methods on one suite over several seeds, side by side: tables, figures and every run, in one folder.

    python -m trainers.compare --suite configs/suites/mini.yaml --methods configs/methods/*.yaml --seeds 0 1 2
    ... --config configs/quickstart.yaml --output runs/compare -- --trainer.max_steps 100

Every (method, seed) is a child process of `train.py fit`. What comes later wins: `--config`s, the method, the suite
(whose overlay may set steps and rates for the size of its model), the seed, and what follows `--`. The same command
again repeats nothing that is done, goes on with what was interrupted, and tries again what failed. A run is the same
while its arguments and the files that they name are: after a change of code, take another `--output`.

Exit codes: 0 where all is well, 1 where runs failed (the others are in the tables), 2 for bad input, 130 after Ctrl-C.
"""

import argparse
import importlib
import inspect
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from jsonargparse import get_loader
from rich.console import Console
from rich.progress import Progress

from adamerge import InputError
from adamerge.files import write_text
from trainers import compare_figures
from trainers.compare_runs import Record, Run, execute
from trainers.comparison import Comparison, Outcome


class Plan:
    """What is to be compared, read from a command line and checked before any work starts."""

    def __init__(self, args: Sequence[str]) -> None:
        at = list(args).index("--") if "--" in args else len(args)
        given = _parser().parse_args(args[:at])
        self.suite, self.seeds, self.output = given.suite, given.seeds, given.output
        self.configs, self.extra = given.config, args[at + 1 :]
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds must be different numbers from 0 on, not {' '.join(map(str, self.seeds))}")
        for path in (*self.configs, self.suite, *given.methods):
            if not path.is_file():
                raise InputError(f"no such file: {path}")
        self.titles, self.seeded = _titles(given.methods), _takes_seed(self.suite)
        if len(self.titles) < len(given.methods):
            raise InputError("two methods' files have the same name, which is that of the folder of their runs")
        root = self.output / "runs"
        self.runs = [self._run(root, path.stem, seed, path) for seed in self.seeds for path in given.methods]

    def preparation(self, seed: int) -> Run:
        """A single step without a method: no method's time and memory shall be those of building a suite."""
        first = seed if self.seeded else self.seeds[0]
        return self._run(self.output, "prepare", first, None, "--trainer.max_steps", "1", "--report.figures", "false")

    def _run(self, root: Path, name: str, seed: int, method: Path | None, *more: str) -> Run:
        files = [*self.configs, *([method] if method else []), self.suite]
        arguments = [part for path in files for part in ("--config", str(path))]
        arguments += ["--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
        if self.seeded:
            arguments += ["--model.init_args.suite.init_args.seed", str(seed)]
        return Run(name, seed, root, (*arguments, *self.extra, *more, "--name", f"{name}/seed{seed}"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m trainers.compare",
        description="Compare methods on one suite over several seeds. Repeat the command to go on where it stopped.",
        epilog="What follows `--` is handed to every run, after all else: -- --trainer.max_steps 100",
        allow_abbrev=False,
    )
    parser.add_argument("--suite", type=Path, required=True, help="overlay that names the suite")
    parser.add_argument("--methods", type=Path, nargs="+", required=True, help="overlays, one a method, in table order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--config", type=Path, action="append", default=[], help="overlay for all runs; may come again")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="default: runs/compare")
    return parser


def _titles(methods: Sequence[Path]) -> dict[str, str]:
    """What a reader sees: an overlay's first comment up to a bracket, colon or full stop, and its name if need be."""
    titles = {}
    for path in methods:
        comment = re.match(r"#\s*([^(:.;\n]{1,40})[(:.;\n]", path.read_text(encoding="utf-8"))
        titles[path.stem] = comment[1].strip() if comment else path.stem
    every = list(titles.values())
    return {stem: title if every.count(title) == 1 else f"{title} ({stem})" for stem, title in titles.items()}


def _takes_seed(overlay: Path) -> bool:
    """Whether the suite that an overlay names is drawn or trained anew with each seed."""
    try:
        spec = get_loader("yaml")(overlay.read_text(encoding="utf-8"))["model"]["init_args"]["suite"]
        module, _, name = (spec if isinstance(spec, str) else spec["class_path"]).rpartition(".")
        suite = getattr(importlib.import_module(module or "adamerge.suites"), name)
    except Exception as error:  # torn YAML, another structure, no such module: whatever importing it raises
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{overlay} names no suite (model: init_args: suite) that can be imported: {what}") from None
    return "seed" in inspect.signature(suite).parameters


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; bad input ends in a sentence on stderr and exit code 2."""
    sys.path.insert(0, os.getcwd())  # so that class_path finds a user's own module, as in `train.py`
    given = list(sys.argv[1:] if args is None else args)
    try:
        plan = Plan(given)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    code = 0
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop jobs with it: end as cleanly
    try:
        _run_all(plan)
    except KeyboardInterrupt:
        code = 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    comparison = _report(plan, "python -m trainers.compare " + shlex.join(given))
    raise SystemExit(code or bool(comparison.failures))


def _run_all(plan: Plan) -> None:
    """Make what is not there yet, with a bar over all runs, or a line for each where there is no terminal."""
    todo = [run for run in plan.runs if run.results() is None]
    total, console, prepared = len(plan.runs), Console(), set[int]()
    if len(todo) < total:
        console.print(f"{total - len(todo)} of {total} runs are there already", highlight=False)
    with Progress(console=console, disable=not console.is_terminal, speed_estimate_period=1e9) as bar:
        task = bar.add_task("", total=total, completed=total - len(todo))
        bar.advance(task, 0)  # the time left is estimated from here on
        for number, run in enumerate(todo, total - len(todo) + 1):
            first = plan.preparation(run.seed)
            if run.seed not in prepared and first.results() is None:
                bar.update(task, description=f"preparing the suite, seed {run.seed}")
                execute(first)  # if it fails, so will the runs, and they are what is reported
            prepared.add(run.seed)
            title = f"{number}/{total} {plan.titles[run.method]}, seed {run.seed}"
            bar.update(task, description=title)
            ending = _ending(run, execute(run))
            bar.advance(task)
            bar.console.print(f"{title}: {ending}", markup=False, highlight=False, soft_wrap=True)


def _ending(run: Run, record: Record) -> str:
    """How a run ended, in a line."""
    if record.error:
        return f"failed: {record.error}"
    averages = {row["method"]: row["average"] for row in (run.results() or {})["rows"]}
    return f"{100 * averages['this run, adapted']:.1f} %, {record.seconds:.0f} s, {record.peak_gb or 0:.1f} GB"


def _report(plan: Plan, command: str) -> Comparison:
    """Gather what there is, method by method; write and print it."""
    outcomes = []
    for run in sorted(plan.runs, key=lambda run: list(plan.titles).index(run.method)):
        record, results = run.record() or Record("", "not run yet"), run.results()
        fate = (results, None if results else record.error, record.seconds, record.peak_gb)
        outcomes.append(Outcome(plan.titles[run.method], run.seed, *fate, str(run.folder / "log.txt")))
    comparison = Comparison.of(outcomes, plan.suite.stem, command, plan.seeded)
    write_text(plan.output / "compare.json", json.dumps(asdict(comparison), indent=1) + "\n")
    write_text(plan.output / "compare.md", comparison.markdown())
    compare_figures.draw(comparison, plan.output / "figures")
    comparison.show()
    Console().print(f"Tables and figures are in {plan.output}", soft_wrap=True, highlight=False)
    return comparison


if __name__ == "__main__":
    main()
