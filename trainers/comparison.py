"""A comparison of methods: runs gathered over their seeds, as Markdown and as tables on the terminal."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from trainers.evaluation import ORACLE
from trainers.results import markdown_table, show_table

#: The row of task arithmetic with each seed's own best scale.
BEST = f"task arithmetic, best ({ORACLE})"
#: Numbers beside the accuracies by task, and the heads of their columns.
COLUMNS = {"average": "avg", "normalised": "norm", "task_identification": "task found", "learned_parameters": "learned"}
COLUMNS |= {"stored_parameters": "stored", "seconds_per_step": "s/step", "peak_gb": "peak GB"}
_NOTHING = "–"


@dataclass(frozen=True)
class Outcome:
    """What became of a run: what its `results.json` says, or why there is none."""

    method: str
    seed: int
    results: Mapping[str, Any] | None = None
    error: str | None = None
    seconds: float = 0.0
    peak_gb: float | None = None
    log: str = ""


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation of the values of several seeds; one value has no deviation."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stat":
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        """In %; without a deviation where the seeds change nothing."""
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.std:.1f}" if self.std else "")


@dataclass(frozen=True)
class Row:
    """One line of the tables: a reference, or what some runs of a method scored; its main row has the method's name."""

    label: str
    method: str | None
    seeds: tuple[int, ...]
    accuracy: Mapping[str, Stat]  # by task
    numbers: Mapping[str, Stat]  # those of `COLUMNS` that the runs have
    told: str  # what the method needs beside images and the task of each

    @classmethod
    def of(cls, label: str, method: str | None, by_seed: Mapping[int, Mapping[str, Any]]) -> "Row":
        found = list(by_seed.values())
        tasks = found[0]["accuracy"] if found else ()
        values = {name: [row[name] for row in found if row.get(name) is not None] for name in COLUMNS}
        told = [what for row in found[:1] for what in row.get("information", ()) if what not in ("images", "task id")]
        accuracy = {task: Stat.of([row["accuracy"][task] for row in found]) for task in tasks}
        numbers = {name: Stat.of(own) for name, own in values.items() if own}
        return cls(label, method, tuple(by_seed), accuracy, numbers, ", ".join(told))


@dataclass(frozen=True)
class Comparison:
    """Everything that was found, the command that found it, and whether the suite is another one with each seed."""

    suite: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    runs: tuple[Outcome, ...]
    command: str
    seeded: bool

    @classmethod
    def of(cls, runs: Sequence[Outcome], suite: str, command: str = "", seeded: bool = False) -> "Comparison":
        """Gather runs, of which some may have failed: references once, then methods in the order in which they come."""
        found: dict[tuple[str, str | None], dict[int, Mapping[str, Any]]] = {}
        for run in runs:
            found.setdefault((run.method, run.method), {})
            for label, method, scores in _scores(run):
                found.setdefault((label, method), {}).setdefault(run.seed, scores)
        ordered = sorted(found.items(), key=lambda item: item[0][1] is not None)
        seeds = tuple(dict.fromkeys(run.seed for run in runs))
        return cls(suite, seeds, tuple(Row.of(*key, by_seed) for key, by_seed in ordered), tuple(runs), command, seeded)

    @property
    def tasks(self) -> list[str]:
        return list(next((row.accuracy for row in self.rows if row.accuracy), ()))

    @property
    def failures(self) -> list[str]:
        """A line for each run without results."""
        failed = (run for run in self.runs if run.results is None)
        return [f"{run.method}, seed {run.seed}: {run.error} ({run.log})" for run in failed]

    def markdown(self) -> str:
        """The whole report: averages and costs, accuracy by task, what they depend on, what failed."""
        spread = "mean ± standard deviation over seeds" if len(self.seeds) > 1 else "one seed"
        lines = [f"# {self.suite}: accuracy in %, {spread}", ""]
        for header, rows in self._tables(10, "**"):
            lines += [*markdown_table(header, rows), ""]
        lines += [self._notes(), ""]
        if self.failures:
            lines += ["## Runs without results", "", *(f"- {line}" for line in self.failures), ""]
        return "\n".join([*lines, "Made by", "", "```bash", self.command, "```", ""])

    def show(self) -> None:
        """Print the tables, in parts that fit a terminal, and what failed."""
        console = Console()
        for header, rows in self._tables(max(1, console.width // 11 - 2) if console.is_terminal else 10):
            show_table(header, rows, [str(row.method) for row in self.rows])
            console.print()
        console.print(self._notes(), style="dim", highlight=False)
        for line in self.failures:
            console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)

    def _tables(self, most: int, bold: str = "") -> Iterator[tuple[list[str], list[list[str]]]]:
        """Header and cells of tables of so many columns at most: averages and costs first, then accuracy by task."""
        missing = [f" ({len(row.seeds)} of {len(self.seeds)} seeds)" * (row.seeds != self.seeds) for row in self.rows]
        names = [row.label + few for row, few in zip(self.rows, missing, strict=True)]
        numbers = [(head, self._column(name, "numbers", bold)) for name, head in COLUMNS.items()]
        numbers.append(("told", [row.told or _NOTHING for row in self.rows]))
        numbers = [(head, cells) for head, cells in numbers if set(cells) != {_NOTHING}]
        tasks = [(task, self._column(task, "accuracy", bold)) for task in self.tasks]
        for columns in (numbers, tasks):
            for first in range(0, len(columns), most):
                heads, cells = zip(*columns[first : first + most], strict=True)
                yield ["method", *heads], [list(line) for line in zip(names, *cells, strict=True)]

    def _column(self, name: str, kind: Literal["numbers", "accuracy"], bold: str) -> list[str]:
        """Cells of a column; of accuracies, that of the best method in bold."""
        stats: list[Stat | None] = [getattr(row, kind).get(name) for row in self.rows]
        cells = [_written(name, stat) if stat else _NOTHING for stat in stats]
        means = {i: stat.mean for i, stat in enumerate(stats) if stat and self.rows[i].method}
        if len(means) > 1 and (kind == "accuracy" or name in ("average", "normalised")):
            best = max(means, key=lambda i: means[i])
            cells[best] = f"{bold}{cells[best]}{bold}"
        return cells

    def _notes(self) -> str:
        """What a reader of the tables needs to know."""
        done = [run.results for run in self.runs if run.results]
        versions = dict.fromkeys(f"{name} {value}" for found in done for name, value in found["versions"].items())
        scales = dict.fromkeys(
            row["method"].split()[2] for found in done for row in found["rows"] if ORACLE in row["method"]
        )
        return (
            f"Seeds of {'models, ' * self.seeded}stream and adaptation: {', '.join(map(str, self.seeds))}; "
            f"{', '.join(versions)}. norm: relative to the experts. {ORACLE}: scale {', '.join(scales) or _NOTHING}, "
            "chosen with labels. learned: numbers that adaptation trains; stored: numbers kept to use the result; "
            "peak GB: largest resident memory, in 10⁹ bytes; told: what a method needs beside images and their tasks."
        )


def _written(name: str, stat: Stat) -> str:
    """A number as its column has it: few parameters to the last, memory and time with three digits."""
    if name.endswith("_parameters"):
        return f"{stat.mean:,.0f}" if stat.mean < 1e7 else f"{stat.mean / 1e6:,.1f} M"
    return f"{stat.mean:#.3g}".rstrip(".") if name in ("seconds_per_step", "peak_gb") else str(stat)


def _scores(run: Outcome) -> Iterator[tuple[str, str | None, Mapping[str, Any]]]:
    """Label, method and numbers of every row of a run."""
    found = run.results or {"rows": ()}
    by_task = found.get("task_identification")
    for row in found["rows"]:
        name = row["method"].removeprefix("this run, ")
        main = name == "adapted"
        if name == row["method"]:
            yield BEST if ORACLE in name else name, None, row
        elif name != "start":
            identified = statistics.fmean(by_task.values()) if main and by_task else None
            costs = {**found, "peak_gb": run.peak_gb, "task_identification": identified}
            yield run.method if main else f"{run.method}, {name}", run.method, {**costs, **row}
