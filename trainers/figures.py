"""Figures of a run. Colours stay the same for a task in all of them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from adamerge.drawing import save, style
from adamerge.kinds import block_of

_ROWS_PER_COLUMN = 52


def coefficient_map(values: Tensor, groups: Sequence[str], experts: Sequence[str], start: Tensor, path: Path) -> None:
    """Heat map of coefficients [groups, K]: one line a tensor or block, one column an expert.

    White is the start where all coefficients have one; else the map shows the change from `start`.

    Many rows are laid out in several columns of panels, each named by block and tensor, so that 200 rows stay readable.
    """
    with style():
        uniform = bool((start == start[0, 0]).all())
        table, white = (values.numpy(), start[0, 0].item()) if uniform else ((values - start).numpy(), 0.0)
        spread = max(float(np.abs(table - white).max()), 1e-3)
        norm = TwoSlopeNorm(white, white - spread, white + spread)
        columns = math.ceil(len(groups) / _ROWS_PER_COLUMN)
        per_column = math.ceil(len(groups) / columns)
        width = (1.9 + 0.27 * len(experts)) * columns + 0.9
        figure = Figure(
            figsize=(max(4.2, width), 1.3 + 0.135 * per_column + 0.05 * max(map(len, experts))), layout="constrained"
        )
        panels = figure.subplots(1, columns, squeeze=False)[0]
        for axes, first in zip(panels, range(0, len(groups), per_column), strict=True):
            part = slice(first, first + per_column)
            image = axes.imshow(table[part], cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
            _label_rows(axes, groups[part])
            axes.set_xticks(range(len(experts)), experts, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
        figure.colorbar(
            image,
            ax=list(panels),
            label="coefficient" if uniform else "change of coefficient",
            shrink=0.6,
            aspect=30,
            pad=0.01,
        )
        figure.suptitle("Coefficients after adaptation", fontsize=10)
        save(figure, path)


def coefficient_paths(steps: Sequence[int], values: Tensor, experts: Sequence[str], path: Path) -> None:
    """Coefficients over steps [snapshots, groups, K]: median over rows and, shaded, the middle 80 %."""
    with style():
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        low, middle, high = np.quantile(values.numpy(), (0.1, 0.5, 0.9), axis=1)
        for k, expert in enumerate(experts):
            axes.plot(steps, middle[:, k], color=colour(k), label=expert, lw=1.4)
            if values.shape[1] > 1:
                axes.fill_between(steps, low[:, k], high[:, k], color=colour(k), alpha=0.1, lw=0)
        axes.set(xlabel="step", ylabel="coefficient", title="Coefficients: median over rows, shaded 10 to 90 %")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, path)


def progress(
    steps: Sequence[int],
    losses: Tensor,
    objective: str,
    accuracies: Mapping[int, Mapping[str, float]],
    experts: Mapping[str, float] | None,
    tasks: Sequence[str],
    path: Path,
) -> None:
    """Loss by task [steps, K], smoothed, and held-against accuracy by task over steps; dots mark the experts."""
    with style():
        figure = Figure(figsize=(9.6, 3.2) if accuracies else (6.2, 3.2), layout="constrained")
        panels = figure.subplots(1, 2 if accuracies else 1, squeeze=False)[0]
        smooth = max(1, len(steps) // 40)
        for k, task in enumerate(tasks):
            came = ~losses[:, k].isnan()  # a step need not have images of every task
            at, raw = np.asarray(steps)[came.numpy()], losses[came, k].float().numpy()
            panels[0].plot(at, raw, color=colour(k), alpha=0.15, lw=0.6)
            if len(at) >= smooth:
                smoothed = np.convolve(raw, np.ones(smooth) / smooth, "valid")
                panels[0].plot(at[smooth - 1 :], smoothed, color=colour(k), lw=1.4, label=task)
        panels[0].set(
            xlabel="step",
            ylabel="entropy (nats)" if objective == "Entropy" else objective,
            title="Loss by task" + f", mean of {smooth} steps" * (smooth > 1),
        )
        if float(losses.nan_to_num().min()) >= 0:  # a margin or minus an entropy is negative
            panels[0].set_ylim(bottom=0)
        if accuracies:
            at = sorted(accuracies)
            for k, task in enumerate(tasks):
                percent = [100 * accuracies[s][task] for s in at]
                panels[1].plot(at, percent, color=colour(k), lw=1.4, marker=".", ms=4, label=task)
                if experts and task in experts:
                    panels[1].axhline(100 * experts[task], color=colour(k), lw=0.7, ls=":")
            mean = [100 * sum(accuracies[s].values()) / len(tasks) for s in at]
            panels[1].plot(at, mean, color="black", lw=2, label="average")
            panels[1].set(xlabel="step", ylabel="accuracy (%)", title="Accuracy by task")
            if experts:
                panels[1].plot([], [], color="black", lw=0.7, ls=":", label="experts")
        lines = {str(line.get_label()): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
        columns = max(1, math.ceil(len(lines) / 20))
        figure.legend(lines.values(), lines, loc="outside right center", ncols=columns, frameon=False, fontsize=7)
        save(figure, path)


def online(curves: Mapping[str, Any], tasks: Sequence[str], path: Path) -> None:
    """Prequential accuracy over the images of a stream that passes once: by task so far, and of all in each window."""
    with style():
        figure = Figure(figsize=(6.2, 3.2), layout="constrained")
        axes = figure.subplots()
        at = curves["images"]

        def line(kind: str, name: str, **ink: Any) -> None:
            values = np.array([np.nan if v is None else 100 * v for v in curves[kind][name]])
            came = ~np.isnan(values)
            if came.any():
                axes.plot(np.asarray(at)[came], values[came], **ink)

        for k, task in enumerate(tasks):
            # A window has few images of each task: its own accuracies would hide the curve behind their noise.
            line("cumulative", task, color=colour(k), lw=1.0, label=task)
        line("windowed", "all images", color="black", lw=1.0, ls=":", label="all images, window")
        line("cumulative", "all images", color="black", lw=2, label="all images so far")
        if curves["cumulative, task given"] != {"all images": curves["cumulative"]["all images"]}:
            line("cumulative, task given", "all images", color="grey", lw=2, label="all so far, task given")
        axes.set(xlabel="images", ylabel="accuracy (%)", title="Predicted, then adapted on", ylim=(0, 100))
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, path)


def accuracy_bars(rows: Mapping[str, Mapping[str, float]], tasks: Sequence[str], path: Path) -> None:
    """Accuracy per task of the rows worth comparing, experts as black lines."""
    with style():
        experts = rows.get("experts", {})
        shown = [name for name in rows if name not in ("experts", "mean", "task arithmetic 0.3")]
        figure = Figure(figsize=(1.4 + 0.8 * (len(tasks) + 1), 3.3), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(tasks) + 1)
        bar = 0.8 / len(shown)
        for i, name in enumerate(shown):
            heights = [100 * rows[name].get(task, np.nan) for task in tasks]
            heights.append(float(np.nanmean(heights)))
            axes.bar(places - 0.4 + (i + 0.5) * bar, heights, bar, label=name, color=_greys(i, len(shown)))
        if experts:
            marks = [100 * experts.get(task, np.nan) for task in tasks]
            marks.append(float(np.nanmean(marks)))
            axes.hlines(marks, places - 0.44, places + 0.44, color="black", lw=1.2, label="experts")
        axes.set_xticks(places, [*tasks, "average"], rotation=30, ha="right", rotation_mode="anchor")
        axes.set(ylabel="accuracy (%)", ylim=(0, 100))
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3)
        save(figure, path)


def pareto_front(promised: Tensor, true: Tensor, tasks: Sequence[str], path: Path) -> None:
    """Trade-offs between tasks as lines over tasks [points, T], the chosen one first: by surrogates, and on new images.

    Two tasks are drawn against each other instead.
    """
    with style():
        pairs = len(tasks) == 2
        figure = Figure(figsize=(5.2 if pairs else 2.4 + 0.8 * len(tasks), 3.4), layout="constrained")
        axes = figure.subplots()
        for losses, ink, label in ((promised, "#7f93a6", "surrogate"), (true, "#c0392b", "new images")):
            table = losses.numpy()
            if pairs:
                axes.scatter(table[1:, 0], table[1:, 1], s=9, color=ink, alpha=0.4, lw=0)
                axes.scatter(table[0, 0], table[0, 1], s=50, color=ink, marker="*", label=f"chosen, {label}")
            else:
                axes.plot(table[1:].T, color=ink, alpha=0.12, lw=0.8)
                axes.plot(table[0], color=ink, lw=1.8, marker=".", label=f"chosen, {label}")
        if pairs:
            axes.set(xlabel=f"loss of {tasks[0]}", ylabel=f"loss of {tasks[1]}")
        else:
            axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", rotation_mode="anchor")
            axes.set(ylabel="loss")
        axes.set(title=f"Pareto front: {len(promised)} merges")
        axes.legend(frameon=False, fontsize=7)
        save(figure, path)


def _label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Tensor names at the left, without the block, which a line and a bracketed name mark once."""
    blocks = block_of(names)
    labels, previous = [], None
    for i, name in enumerate(names):
        block = blocks[name]
        inner = name[len(block) + 1 :] if name != block else ""
        labels.append(f"{block}  {inner}".strip() if block != previous else inner)
        if previous is not None and block != previous:
            axes.axhline(i - 0.5, color="black", lw=0.4)
        previous = block
    axes.set_yticks(range(len(names)), labels, fontsize=5.5)
    axes.tick_params(length=0)


def colour(k: int) -> Any:
    """The colour of the k-th of several things, ten of which are easily told apart."""
    import matplotlib

    return matplotlib.colormaps["tab10" if k < 10 else "tab20"](k % 20)


def _greys(i: int, count: int) -> str:
    return "#c0392b" if i == count - 1 else ("#b9c4cf", "#7f93a6", "#f2b5a7", "#4a6074")[i % 4]
