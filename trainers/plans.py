"""What the commands that run several methods share: how they are called, and the runs that they make."""

import argparse
import importlib
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from jsonargparse import get_loader
from rich.console import Console
from rich.progress import Progress

from adamerge.errors import InputError, did_you_mean
from adamerge.files import nearest
from trainers.compare_runs import Record, Run, execute
from trainers.sentences import UNKNOWN


class Plan:
    """Methods to run on one suite, read from a command line and checked before any work starts.

    Subclasses read what is their own from `given`, and say which `runs` there are to be.

    Args:
        args: the command line; what follows `--` is handed to every run.
        parser: knows all the arguments, those of `shared_arguments` among them.
    """

    #: Arguments that no run can do without, whatever follows `--`.
    always: tuple[str, ...] = ()
    #: What is to be made, in this order.
    runs: list[Run]

    def __init__(self, args: Sequence[str], parser: argparse.ArgumentParser) -> None:
        at = list(args).index("--") if "--" in args else len(args)
        self.given, self.extra = parser.parse_args(args[:at]), args[at + 1 :]
        self.suite, self.output, self.methods = self.given.suite, self.given.output, self.given.methods
        for path in (*self.given.config, self.suite, *self.methods):
            if not path.is_file():
                raise InputError(f"no such file: {path}{nearest(path)}")
        self.titles, self.seeded = _titles(self.methods), _takes_seed(self.suite)
        if len(self.titles) < len(self.methods):
            raise InputError("two methods' files have the same name, which is that of the folder of their runs")

    def title(self, run: Run) -> str:
        """What a reader sees of a run."""
        return f"{self.titles[run.method]}, seed {run.seed}"

    def preparation(self, seed: int) -> Run:
        """A single step without a method: no method's time and memory shall be those of building a suite."""
        first = seed if self.seeded else self.runs[0].seed
        return self.run(self.output, "prepare", first, None, "--trainer.max_steps", "1", "--report.figures", "false")

    def run(self, root: Path, name: str, seed: int, method: Path | None, *more: str) -> Run:
        """A run whose arguments are the files, the seed, what follows `--`, what no run can do without, and more."""
        files = [*self.given.config, *([method] if method else []), self.suite]
        arguments = [part for path in files for part in ("--config", str(path))]
        arguments += ["--seed_everything", str(seed), "--data.init_args.seed", str(seed)]
        if self.seeded:
            arguments += ["--model.init_args.suite.init_args.seed", str(seed)]
        return Run(name, seed, root, (*arguments, *self.extra, *self.always, *more, "--name", f"{name}/seed{seed}"))


class Parser(argparse.ArgumentParser):
    """Raises InputError for what it does not understand."""

    def error(self, message: str) -> NoReturn:
        if match := UNKNOWN.match(message):
            known = [name for name in self._option_string_actions if name.startswith("--")]
            message = (
                f"there is no argument {match[1]}{did_you_mean(match[1], known, '.')} "
                "What is meant for every run comes after --, such as -- --trainer.max_steps 100"
            )
        raise InputError(message)


_Plan = TypeVar("_Plan", bound=Plan)


def shared_arguments(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the arguments that every plan has."""
    parser.add_argument("--suite", type=Path, required=True, help="overlay that names the suite")
    parser.add_argument("--methods", type=Path, nargs="+", required=True, help="overlays, one a method, in table order")
    parser.add_argument("--config", type=Path, action="append", default=[], help="overlay for all runs; may come again")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"default: {output}")


def read(plan: Callable[[Sequence[str]], _Plan], args: Sequence[str]) -> _Plan:
    """The plan of a command line; bad input ends in a sentence on stderr and exit code 2."""
    sys.path.insert(0, os.getcwd())  # so that class_path finds a user's own module, as in `train.py`
    try:
        return plan(args)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def make(plan: Plan, ending: Callable[[Run, Record], str]) -> int:
    """Make what is not there yet; `ending` says in a line how a run ended. Returns 0, or 130 if it was stopped."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop jobs with it: end as cleanly
    try:
        _make(plan, ending)
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _make(plan: Plan, ending: Callable[[Run, Record], str]) -> None:
    """With a bar over all runs, or a line for each where there is no terminal."""
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
            title = f"{number}/{total} {plan.title(run)}"
            bar.update(task, description=title)
            line = ending(run, execute(run))
            bar.advance(task)
            bar.console.print(f"{title}: {line}", markup=False, highlight=False, soft_wrap=True)


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
