"""Figures of a comparison: what accuracy costs in learned numbers, and accuracy by task."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from adamerge.drawing import save, style
from trainers.comparison import BEST, Comparison
from trainers.figures import colour

_MARKERS = "osD^vPX"
_GREY = "#555555"
_PRINT = 300  # dots per inch


def draw(comparison: Comparison, folder: Path) -> None:
    """All figures for which there are numbers."""
    if any(row.method and row.accuracy for row in comparison.rows):
        accuracy_vs_parameters(comparison, folder / "accuracy_vs_parameters.png")
        accuracy_by_task(comparison, folder / "accuracy_by_task.png")


def accuracy_vs_parameters(comparison: Comparison, path: Path) -> None:
    """Average accuracy of each method over the numbers it learns, best first in the legend.

    Bars and bands are one standard deviation over the seeds. A hollow point is another row of a method.
    """
    rows = sorted((row for row in comparison.rows if row.accuracy), key=lambda row: -row.numbers["average"].mean)
    methods = list(dict.fromkeys(row.method for row in rows if row.method))
    counts = {row.method: row.numbers["learned_parameters"].mean for row in rows if row.method}
    least = 10 ** math.floor(math.log10(min((n for n in counts.values() if n >= 1), default=1)))
    handles: list[Any] = []
    with style():
        figure = Figure(figsize=(7.2, max(3.9, 0.3 + 0.165 * len(rows))), layout="constrained", dpi=_PRINT)
        axes = figure.subplots()
        for row in rows:
            average = row.numbers["average"]
            level, spread, label = 100 * average.mean, 100 * (average.std or 0), f"{average}  {row.label}"
            if row.method:
                k, main = methods.index(row.method), row.label == row.method
                ink, marker = colour(k % 10), _MARKERS[k % len(_MARKERS)]
                dot: Any = {"fmt": marker, "ms": 5, "color": ink, "mfc": ink if main else "white", "elinewidth": 1}
                handles.append(axes.errorbar(counts[row.method], level, spread, label=label, **dot))
            elif row.label in ("experts", BEST):
                dashes = "--" if row.label == BEST else "-"
                handles.append(axes.axhline(level, color=_GREY, lw=1, ls=dashes, zorder=1, label=label))
                axes.axhspan(level - spread, level + spread, color=_GREY, alpha=0.08, lw=0)
        axes.set_xscale("symlog", linthresh=least, linscale=0.5)  # 0, for what learns nothing, then decades
        axes.set_xlim(-0.2 * least, max(*counts.values(), 10 * least) * 1.6)
        axes.set(xlabel="learned parameters", ylabel="average accuracy (%)")
        axes.legend(handles=handles, frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, path)


def accuracy_by_task(comparison: Comparison, path: Path) -> None:
    """A table in colours: rows as in the text, a column per task, darker the more of the expert's accuracy is lost."""
    rows = [row for row in comparison.rows if row.accuracy]
    names = [*comparison.tasks, "average"]
    stats = [[*(row.accuracy.get(task) for task in comparison.tasks), row.numbers["average"]] for row in rows]
    values = 100 * np.array([[np.nan if stat is None else stat.mean for stat in line] for line in stats])
    experts = next((line for row, line in zip(rows, values, strict=True) if row.label == "experts"), 100)
    kept = 100 * values / np.maximum(experts, 1e-9)
    references = sum(row.method is None for row in rows)
    low = min(90.0, math.floor(np.nanmin(kept[references:]) / 10) * 10)  # references may be darker than the scale goes
    with style():
        width = 1.2 + 0.068 * max(len(row.label) for row in rows) + 0.46 * len(names)
        figure = Figure(figsize=(width, 1.3 + 0.25 * len(rows)), layout="constrained", dpi=_PRINT)
        axes = figure.subplots()
        image = axes.imshow(kept, cmap="Blues_r", vmin=low, vmax=100 + 0.25 * (100 - low), aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            ink = "white" if kept[i, j] < low + 0.55 * (100 - low) else "black"
            axes.text(
                j, i, "" if math.isnan(value) else f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink
            )
        axes.xaxis.tick_top()
        axes.set_xticks(range(len(names)), names, rotation=40, rotation_mode="anchor", fontsize=8, ha="left")
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.axvline(len(names) - 1.5, color="white", lw=3)
        axes.axhline(references - 0.5, color="white", lw=3)
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=25, extend="min" if np.nanmin(kept) < low else "neither")
        bar.ax.set_ylim(low, 100)
        bar.outline.set_visible(False)
        bar.set_label("% of the expert's accuracy")
        save(figure, path)
