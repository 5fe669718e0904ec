"""The distractors of suite Mini: tasks of abstract patterns, whose experts are of no use for its other tasks."""

import zlib

import numpy as np
from PIL import Image

from adamerge.suites.mini_tasks import CANVAS, MiniTask

_CLASSES, _CELLS, _SHIFT = tuple("0123456789"), 7, 12


def pattern(number: int) -> MiniTask:
    """The task of that number: each of ten classes is a smooth random field of colours, shifted, tinted and in fog."""
    drawn = np.random.default_rng([zlib.crc32(b"patterns"), number])
    cells = drawn.integers(0, 256, (len(_CLASSES), _CELLS, _CELLS, 3), np.uint8)
    fields = {
        name: np.asarray(Image.fromarray(field).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))
        for name, field in zip(_CLASSES, cells, strict=True)
    }

    def paint(name: str, rng: np.random.Generator) -> Image.Image:
        shifted = np.roll(fields[name], rng.integers(-_SHIFT, _SHIFT + 1, 2), (0, 1))
        tint = rng.integers(0, 256, 3)  # so that colour alone does not give a class away
        return Image.fromarray((shifted + rng.uniform(0, 0.5) * (tint - shifted.astype(np.float32))).astype(np.uint8))

    return MiniTask(f"pattern{number}", _CLASSES, (0.4, 0.75), paint)
