"""How every figure of this project looks, and how it is written."""

from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from adamerge.files import replacing

_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "figure.dpi": 160,
}


def style() -> AbstractContextManager[None]:
    """The look, as a context in which figures are made."""
    return matplotlib.rc_context(_STYLE)  # type: ignore[arg-type]


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the file's name says; it has that name only once it is complete."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
