"""Learned coefficients as a small readable file: names, numbers and the fingerprints of what they belong to."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adamerge.errors import InputError
from adamerge.files import write_text
from adamerge.plain_files import read_json

FORMAT = "adamerge-coefficients-1"

#: λ of one tensor and task: a number, or one for every input column.
Value = float | list[float]


@dataclass(frozen=True)
class CoefficientTable:
    """λ by tensor name and task.

    Attributes:
        rows: `rows[tensor][task]`, effective values (after any bound): a number, or a list with one per input column.
        fingerprints: of the base and the experts they were learned on (may be empty).
    """

    rows: Mapping[str, Mapping[str, Value]]
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError("a table of coefficients needs at least one tensor")
        for name, row in self.rows.items():
            if set(row) != set(self.tasks):
                raise InputError(f"coefficients of {name} are for tasks {list(row)}, those before: {list(self.tasks)}")
            values = [value if isinstance(value, list) else [value] for value in row.values()]
            if len({(len(value), isinstance(row[task], list)) for task, value in zip(row, values, strict=True)}) > 1:
                raise InputError(f"coefficients of {name} differ in their number of columns from task to task")
            if not values[0] or not all(math.isfinite(x) for value in values for x in value):
                raise InputError(f"coefficients of {name} are not all finite: {dict(row)}")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of the first row."""
        return tuple(next(iter(self.rows.values())))

    def tensor(self, name: str, tasks: tuple[str, ...]) -> torch.Tensor:
        """λ of one tensor, [K] or, by column, [J, K], in the order of `tasks`."""
        return torch.tensor([self.rows[name][task] for task in tasks], dtype=torch.float64).movedim(0, -1)


def write_coefficients(table: CoefficientTable, path: str | Path) -> None:
    """Write a table as JSON, one tensor a line; floats are written so that they read back exactly."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(dict(row))}" for name, row in table.rows.items())
    head = f'"format": "{FORMAT}",\n"fingerprints": {json.dumps(dict(table.fingerprints))}'
    write_text(Path(path), f'{{{head},\n"coefficients": {{\n{lines}\n}}}}\n')


def read_coefficients(path: str | Path) -> CoefficientTable:
    """Read what `write_coefficients` wrote. Raises InputError for a file of another kind."""
    try:
        data = read_json(Path(path))
        if data["format"] != FORMAT:
            raise InputError(f"format {str(data['format'])[:40]!r}, expected {FORMAT!r}")
        rows = {name: {task: _value(v) for task, v in row.items()} for name, row in data["coefficients"].items()}
        fingerprints = {str(name): str(digest) for name, digest in data["fingerprints"].items()}
        return CoefficientTable(rows, fingerprints)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise InputError(f"no such file of coefficients: {path}") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is not a file of coefficients: {error}") from error


def _value(value: Any) -> Value:
    return [float(x) for x in value] if isinstance(value, list) else float(value)
