"""Figures of an inspection."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from adamerge.drawing import save, style
from adamerge.inspecting.geometry import Geometry, ratio
from adamerge.inspecting.spectra import Spectrum

#: Tables whose entries all stay below it are pale all over.
_PALEST = 0.2
_INK, _PALE = "#c0392b", "#b9c4cf"


def draw(geometry: Geometry, spectra: Sequence[Spectrum], folder: Path) -> None:
    """`cosine.png`, `norms.png`, `signs.png` and, where matrices were decomposed, `spectra.png`."""
    if not geometry.blocks:
        return
    with style():
        save(_norms(geometry), folder / "norms.png")
        if len(geometry.tasks) > 1:
            save(_cosine(geometry), folder / "cosine.png")
            save(_signs(geometry), folder / "signs.png")
        if spectra:
            save(_spectra(geometry.tasks, spectra), folder / "spectra.png")


def _cosine(geometry: Geometry) -> Figure:
    """The heat map of all pairs."""
    count = len(geometry.tasks)
    figure = Figure(figsize=(2.2 + 0.46 * count, 1.5 + 0.42 * count), layout="constrained")
    axes = figure.subplots()
    _heat(axes, geometry.cosine.numpy(), geometry.tasks, "cosine", figure)
    axes.set_title("Cosine of task vectors")
    return figure


def _norms(geometry: Geometry) -> Figure:
    """One line a block, one column an expert."""
    table, blocks = geometry.norms.numpy(), geometry.blocks
    width = 1.6 + 0.36 * len(geometry.tasks) + 0.055 * max(map(len, blocks))
    figure = Figure(figsize=(max(3.4, width), 1.4 + 0.17 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    _ticks(axes, geometry.tasks, blocks)
    axes.set_title("Norm of task vectors by block")
    figure.colorbar(image, ax=axes, label="norm", aspect=20)
    return figure


def _signs(geometry: Geometry) -> Figure:
    """By block: entries with the minority's sign, and how much of all movement is against the sum."""
    shares = 100 * ratio(geometry.against.sum(1), geometry.changed.sum(1)).numpy()
    weighted = 100 * ratio(geometry.against_mass.sum(1), geometry.mass.sum(1)).numpy()
    places = np.arange(len(geometry.blocks))
    width = 4.2 + 0.055 * max(map(len, geometry.blocks))
    figure = Figure(figsize=(width, 1.5 + 0.22 * len(places)), layout="constrained")
    axes = figure.subplots()
    axes.barh(places - 0.2, shares, 0.38, color=_PALE, label="changed entries with the minority's sign")
    axes.barh(places + 0.2, weighted, 0.38, color=_INK, label="movement against the sign of the sum")
    axes.axvline(100 * geometry.chance, color="black", lw=0.8, ls=":", label="minority by tossing coins")
    axes.set_yticks(places, geometry.blocks, fontsize=7)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set(xlabel="share (%)", title="Sign conflict by block")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=7)
    return figure


def _spectra(tasks: Sequence[str], spectra: Sequence[Spectrum]) -> Figure:
    """Energy by the share of directions, mean of the matrices; beside it, how far pairs share their spaces."""
    several = len(tasks) > 1
    width = 4.4 + (2.2 + 0.46 * len(tasks) if several else 0)
    figure = Figure(figsize=(width, max(3.2, 1.5 + 0.42 * len(tasks))), layout="constrained")
    ratios = {"width_ratios": [4.4, width - 4.4]} if several else None
    panels = figure.subplots(1, 1 + several, squeeze=False, gridspec_kw=ratios)[0]
    at = np.linspace(0, 1, 101)
    for k, task in enumerate(tasks):
        curves = [_energy(spectrum.values[k], at) for spectrum in spectra if bool(spectrum.values[k].any())]
        if curves:
            colour = matplotlib.colormaps["tab10" if len(tasks) <= 10 else "tab20"](k % 20)
            panels[0].plot(100 * at, 100 * np.mean(curves, 0), color=colour, lw=1.4, label=task)
    share = float(np.mean([spectrum.rank / min(spectrum.shape) for spectrum in spectra]))
    if several:
        panels[0].axvline(100 * share, color="black", lw=0.8, ls=":", label="an expert's share")
    panels[0].set(xlabel="singular directions (%)", ylabel="energy (%)", ylim=(0, 103), xlim=(0, 100))
    count = "one matrix" if len(spectra) == 1 else f"mean of {len(spectra)} matrices"
    panels[0].set_title(f"Energy in the largest directions, {count}")
    panels[0].legend(frameon=False, fontsize=7, loc="lower right")
    if several:
        mean = torch.stack([spectrum.overlap for spectrum in spectra]).mean(0).numpy()
        _heat(panels[1], mean, tasks, "overlap beyond chance", figure)
        panels[1].set_title("Overlap of spaces")
    return figure


def _energy(values: torch.Tensor, at: np.ndarray) -> np.ndarray:
    """The share of Σσ² in the largest directions, at shares of their number."""
    energy = values.square().cumsum(0).numpy()
    shares = np.concatenate([[0.0], energy / energy[-1]])
    return np.interp(at, np.linspace(0, 1, len(shares)), shares)


def _heat(axes: Axes, table: np.ndarray, tasks: Sequence[str], label: str, figure: Figure) -> None:
    """A symmetric table of pairs with its numbers, coloured by the spread off the diagonal."""
    beside = ~np.eye(len(tasks), dtype=bool)
    spread = max(float(np.abs(table[beside]).max()), _PALEST)
    shown = np.where(beside, table, np.nan)
    image = axes.imshow(shown, cmap="RdBu_r", norm=TwoSlopeNorm(0, -spread, spread), interpolation="nearest")
    for i, j in zip(*np.nonzero(beside), strict=True):
        ink = "white" if abs(table[i, j]) > 0.6 * spread else "black"
        axes.text(j, i, f"{table[i, j]:.2f}".replace("-0.00", "0.00"), ha="center", va="center", fontsize=6, color=ink)
    _ticks(axes, tasks, tasks)
    figure.colorbar(image, ax=axes, label=label, shrink=0.7, aspect=25)


def _ticks(axes: Axes, columns: Sequence[str], rows: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns, rotation=50, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
