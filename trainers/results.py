"""Results of a run as JSON, Markdown and a table on the terminal."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from adamerge.files import json_file, write_text
from trainers.evaluation import ORACLE, Accuracy, average


@dataclass(frozen=True)
class Results:
    """What a run achieved.

    Attributes:
        suite: the suite's name.
        tasks: column order.
        rows: accuracy by task, by method; "experts" is each expert on its own task, and what "normalised" divides by.
        settings: everything else worth keeping: seeds, fingerprints, wall time, method, versions.
    """

    suite: str
    tasks: tuple[str, ...]
    rows: Mapping[str, Accuracy]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def normalised(self, method: str) -> float | None:
        """Mean over tasks that have an expert of accuracy divided by the expert's; none where none was scored."""
        experts, row = self.rows.get("experts", {}), self.rows[method]
        shares = [row[task] / max(expert, 1e-12) for task, expert in experts.items() if task in row]
        return sum(shares) / len(shares) if shares else None

    def write(self, folder: Path) -> None:
        """Leave `results.json` and `results.md` in a folder."""
        rows = [
            {"method": m, "accuracy": dict(a), "average": average(a), "normalised": self.normalised(m)}
            for m, a in self.rows.items()
        ]
        data = {"suite": self.suite, "rows": rows, **self.settings}
        write_text(folder / "results.json", json.dumps(data, indent=1) + "\n")
        write_text(folder / "results.md", self.markdown())

    def markdown(self) -> str:
        """A table in Markdown, with what it depends on below."""
        lines = [f"# {self.suite}: accuracy in %", "", *markdown_table(self._header(), self._cells())]
        plain = json.loads(json.dumps(self.settings))
        told = yaml.safe_dump(_told(plain), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        return "\n".join([*lines, "", self._caption(), "", "```yaml", f"{told}```"]) + "\n"

    def show(self) -> None:
        """Print the table; eight tasks fit into 80 columns."""
        bold = ["this run, adapted"]
        show_table(self._header(), self._cells(), bold, title=f"{self.suite}: accuracy in %", caption=self._caption())

    @staticmethod
    def _caption() -> str:
        return f"norm: relative to the experts. {ORACLE}: the best scale of a grid, chosen with labels."

    def _header(self) -> list[str]:
        return ["method", *self.tasks, "avg", "norm"]

    def _cells(self) -> list[list[str]]:
        cells = []
        for method, row in self.rows.items():
            numbers = [*(row.get(task) for task in self.tasks), average(row), self.normalised(method)]
            cells.append([method, *("" if number is None else f"{100 * number:.1f}" for number in numbers)])
        return cells


def whole_results(path: Path) -> dict[str, Any] | None:
    """What a `results.json` says; none where it is not there or not as `Results.write` leaves it."""
    data = json_file(path)
    rows = data.get("rows") if isinstance(data, dict) else None
    if not isinstance(rows, list):
        return None
    for row in rows:
        scores = row.get("accuracy") if isinstance(row, dict) else None
        if not isinstance(scores, dict) or not scores or not isinstance(row.get("method"), str):
            return None
        if not all(_is_number(value) for value in (*scores.values(), row.get("average"))):
            return None
        if not (row.get("normalised") is None or _is_number(row["normalised"])):
            return None
    return data


def _is_number(value: object) -> bool:
    # JSON has integers that no float holds.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown: names at the left, numbers at the right."""
    rule = "|---" + "|---:" * (len(header) - 1) + "|"
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(cells)} |" for cells in rows)]


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]], bold: Sequence[str], **about: Any) -> None:
    """Print a table, in which names wrap; where no terminal sets a width, as wide as it needs to be."""
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, caption_justify="left", **about)
    table.add_column(header[0], min_width=12)
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells, style="bold" if cells[0] in bold else None)
    console = Console()
    if not console.is_terminal:
        console = Console(width=Console(width=10_000).measure(table).maximum)
    console.print(table)


def _told(value: Any) -> Any:
    """What a reader wants to know of a setting: of fingerprints the beginning, and nothing that is empty."""
    if isinstance(value, dict):
        told = {key: _told(inner) for key, inner in value.items()}
        return {key: inner for key, inner in told.items() if inner not in (None, [], {})}
    if isinstance(value, list):
        return [_told(inner) for inner in value]
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
