"""The tasks of suite Mini: real handwritten digits and seven drawn ones, 32 × 32 RGB, seeded, seen in fog.

A painter turns (class name, generator) into one 64 × 64 picture; `MiniTask.draw` shrinks it and lays fog and noise
over it. The base learns from clear pictures, the experts and all tests see fog: a shift of domain.
Train and test come from different streams; the handwritten digits are split once, so the two never share an image.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Split = Literal["train", "test"]
Color = tuple[int, int, int]
Painter = Callable[[str, np.random.Generator], Image.Image]

#: Goes into the names of files that are kept: raise it when drawing or training changes.
VERSION = 3
SIZE = 32
NOISE = 5.0  # standard deviation, in grey levels
CANVAS = 2 * SIZE  # pictures are drawn at twice the size, then averaged down
FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"),
    *("DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"),
)


@dataclass(frozen=True)
class MiniTask:
    """One classification task: `draw` is a pure function of its arguments."""

    name: str
    classes: tuple[str, ...]
    fog: tuple[float, float]
    """Range of the share of an image that is grey fog: 0 is clear sight, 1 hides everything."""
    paint: Painter | None = None
    """Draws one picture of a class; None stands for the handwritten digits of scikit-learn."""

    def draw(self, split: Split, count: int, seed: int, clear: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (count, 32, 32, 3) and labels int64 (count,), classes balanced to within one.

        `clear` leaves out fog and noise, and draws from a stream of its own.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), split == "test", clear, seed])
        labels = rng.permutation(np.arange(count) % len(self.classes)).astype(np.int64)
        if self.paint is None:
            images = _handwritten(split, labels, rng).astype(np.float32)
        else:
            pictures = [np.asarray(self.paint(self.classes[k], rng).reduce(2)) for k in labels]
            images = np.array(pictures, np.float32).reshape(count, SIZE, SIZE, 3)
        if not clear:
            share, grey = (
                rng.uniform(*ends, (count, 1, 1, 1)).astype(np.float32) for ends in (self.fog, (90.0, 190.0))
            )
            images += share * (grey - images) + NOISE * rng.standard_normal(images.shape, np.float32)
        return images.clip(0, 255).astype(np.uint8), labels


@cache
def _digits() -> tuple[np.ndarray, dict[tuple[str, int], np.ndarray]]:
    """All 1797 digits at 32 × 32, and the row numbers of each (split, digit): 50 per digit are for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = (data.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for x in small])
    order = np.random.default_rng(0).permutation(len(images))
    rows = {}
    for digit in range(10):
        mine = order[data.target[order] == digit]
        rows["test", digit], rows["train", digit] = mine[:50], mine[50:]
    return np.repeat(images[..., None], 3, axis=-1), rows


def _handwritten(split: str, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One image per label from that split, in a seeded order; each repeats only after all of its digit were used."""
    images, rows = _digits()
    picked = np.zeros(len(labels), np.int64)
    for digit in range(10):
        wanted = np.flatnonzero(labels == digit)
        picked[wanted] = np.resize(rng.permutation(rows[split, digit]), len(wanted))
    return images[picked]


# Brushes ---------------------------------------------------------------------------------------------------------


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)


def _hue(rng: np.random.Generator, low: int = 0, high: int = 256) -> Color:
    r, g, b = rng.integers(low, high, 3)
    return int(r), int(g), int(b)


def _near(color: Color, rng: np.random.Generator, spread: int = 25) -> Color:
    r, g, b = np.clip(np.add(color, rng.integers(-spread, spread + 1, 3)), 0, 255)
    return int(r), int(g), int(b)


def _clouds(color: Color, rng: np.random.Generator, spread: int = 40, cells: int = 5) -> Image.Image:
    """A soft mottled background around a colour."""
    patches = np.clip(np.add(color, rng.integers(-spread, spread + 1, (cells, cells, 3))), 0, 255)
    return Image.fromarray(patches.astype(np.uint8)).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)


def _tilt(image: Image.Image, rng: np.random.Generator, turn: float, shift: int) -> Image.Image:
    dx, dy = (int(v) for v in rng.integers(-shift, shift + 1, 2))
    return image.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, translate=(dx, dy))


# Painters --------------------------------------------------------------------------------------------------------


def _glyphs(
    fonts: tuple[str, ...], ink: tuple[int, int], paper: tuple[int, int], turn: float = 10, neighbours: str = ""
) -> Painter:
    """Paints its class name as text, colours from the two ranges, between neighbouring characters if there are any."""

    def paint(text: str, rng: np.random.Generator) -> Image.Image:
        font = _font(fonts[rng.integers(len(fonts))], int(rng.integers(44, 58)))
        mask = Image.new("L", (CANVAS, CANVAS))
        pen, mid = ImageDraw.Draw(mask), CANVAS / 2
        pen.text((mid, mid), text, fill=255, font=font, anchor="mm")
        if neighbours:
            for at, anchor in ((mid - font.size * 0.42, "rm"), (mid + font.size * 0.42, "lm")):
                pen.text((at, mid), neighbours[rng.integers(len(neighbours))], fill=255, font=font, anchor=anchor)
        image = _clouds(_hue(rng, *paper), rng, 30)
        image.paste(_hue(rng, *ink), mask=_tilt(mask, rng, turn, 4))
        return image

    return paint


def _blur(rough: np.ndarray, freq: float) -> np.ndarray:
    square = np.fft.fftfreq(CANVAS) ** 2
    return np.fft.ifft2(np.fft.fft2(rough) * np.exp(-((square[:, None] + square) * 40**2 / freq))).real


_TAU = 2 * np.pi
_FIELDS: dict[str, Callable[..., np.ndarray]] = {  # of the plain (x, y) and the turned, warped, scaled (u, v)
    "stripes": lambda rng, x, y, u, v, f, rough: np.sin(_TAU * u),
    "checks": lambda rng, x, y, u, v, f, rough: np.sin(_TAU * u) * np.sin(_TAU * v) * 4,
    "dots": lambda rng, x, y, u, v, f, rough: 0.32 - np.hypot(u % 1 - 0.5, v % 1 - 0.5),
    "mesh": lambda rng, x, y, u, v, f, rough: 0.12 - np.minimum(u % 1, v % 1),
    "bricks": lambda rng, x, y, u, v, f, rough: (
        0.12 - np.minimum((v * 1.2) % 1, (u * 0.6 + 0.5 * (np.floor(v * 1.2) % 2)) % 1)
    ),
    "zigzag": lambda rng, x, y, u, v, f, rough: np.sin(_TAU * (u + 0.8 * np.abs(v % 1 - 0.5))),
    "rings": lambda rng, x, y, u, v, f, rough: np.sin(
        _TAU * f * np.hypot(x - rng.uniform(-0.3, 0.3), y - rng.uniform(-0.3, 0.3))
    ),
    "rays": lambda rng, x, y, u, v, f, rough: np.sin(
        round(2 * f) * np.arctan2(y - rng.uniform(-0.2, 0.2), x - rng.uniform(-0.2, 0.2))
    ),
    "blotches": lambda rng, x, y, u, v, f, rough: _blur(rough, f) * 10,
    "speckle": lambda rng, x, y, u, v, f, rough: np.kron(rough[::4, ::4], np.ones((4, 4))) - 0.5,
}


def _texture(kind: str, rng: np.random.Generator) -> Image.Image:
    """Two colours mixed by a periodic or random field of random scale, angle and warp."""
    y, x = np.mgrid[:CANVAS, :CANVAS] / CANVAS - 0.5
    angle, freq = rng.uniform(-0.5, 0.5), rng.uniform(2.5, 4)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    u = freq * (u + 0.02 * np.sin(7 * v + angle)) + rng.random()
    v = freq * v + rng.random()
    rough = rng.standard_normal((CANVAS, CANVAS))
    field = _FIELDS[kind](rng, x, y, u, v, freq, rough)
    mix = 1 / (1 + np.exp(-field * 12))[..., None]
    ink, paper = _hue(rng, 130, 256), _hue(rng, 0, 130)
    return Image.fromarray((mix * ink + (1 - mix) * paper).astype(np.uint8))


_RED, _BLUE, _YELLOW, _WHITE, _BLACK = (190, 30, 40), (30, 70, 170), (235, 190, 40), (240, 240, 240), (25, 25, 25)
_ARROW = np.array([(-3, 12), (3, 12), (3, -1), (9, -1), (0, -13), (-9, -1), (-3, -1)])


_BOARDS: dict[str, tuple[int, float, float, Color, Color]] = {  # sides (0: a disc), size, turn, middle, edge
    "stop": (8, 1.0, 22.5, _RED, _RED),
    "yield": (3, 1.15, 180, _WHITE, _RED),
    "warning": (3, 1.15, 0, _WHITE, _RED),
    "priority": (4, 1.1, 45, _YELLOW, _WHITE),
    "parking": (4, 1.2, 0, _BLUE, _BLUE),
    "no entry": (0, 1.0, 0, _RED, _RED),
    "speed": (0, 1.0, 0, _WHITE, _RED),
    **dict.fromkeys(("left", "right", "ahead"), (0, 1.0, 0, _BLUE, _BLUE)),
}


def _sign(kind: str, rng: np.random.Generator) -> Image.Image:
    """A road sign in front of a blurred street, at some size, tilt and place."""
    sides, size, turn, middle, edge = _BOARDS[kind]
    tints = {c: _near(c, rng) for c in (_RED, _BLUE, _YELLOW)} | {_WHITE: _WHITE}
    plate = Image.new("RGB", (CANVAS, CANVAS))
    pen, r, mid = ImageDraw.Draw(plate), float(rng.uniform(19, 27)), CANVAS / 2
    text = {"stop": "STOP", "speed": ("30", "50", "80")[rng.integers(3)], "parking": "P", "warning": "!"}.get(kind)
    for color, reach in ((edge, r * size), (middle, r * size * (0.76 if sides else 0.74))):
        if sides:
            pen.regular_polygon((mid, mid, reach), sides, rotation=turn, fill=tints[color])
        else:
            pen.ellipse((mid - reach, mid - reach, mid + reach, mid + reach), fill=tints[color])
    if kind == "no entry":
        pen.rectangle((mid - r * 0.65, mid - r * 0.18, mid + r * 0.65, mid + r * 0.18), fill=_WHITE)
    elif kind in ("left", "right", "ahead"):
        a = np.deg2rad({"left": -90, "right": 90, "ahead": 0}[kind])
        turned = _ARROW @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) * (r / 19) + mid
        pen.polygon([(px, py) for px, py in turned.tolist()], fill=_WHITE)
    if text:
        font = _font("DejaVuSans-Bold", int(r * {1: 1.2, 2: 0.9, 4: 0.55}[len(text)]))
        ink = _WHITE if kind in ("stop", "parking") else _BLACK
        pen.text((mid, mid + 2 * (kind == "warning")), text, fill=ink, font=font, anchor="mm")
    street = _clouds(_hue(rng, 40, 190), rng, 60)
    plate = _tilt(plate, rng, 10, 5)
    street.paste(plate, mask=plate.convert("L").point(lambda level: 255 * (level > 8)))
    return street


_GROUND: dict[str, Color] = {
    "sea": (30, 60, 110), "river": (90, 120, 60), "forest": (30, 70, 35), "fields": (120, 130, 60),
    "orchard": (150, 140, 90), "town": (110, 120, 90), "factory": (110, 110, 105), "highway": (110, 125, 75),
    "desert": (205, 175, 120),
}  # fmt: skip


def _land(kind: str, rng: np.random.Generator) -> Image.Image:
    """A patch of the earth from above: ground of a typical colour and, drawn on it, what people made of it."""
    image = _clouds(_near(_GROUND[kind], rng, 30), rng, 18)
    pen, span = ImageDraw.Draw(image), range(-CANVAS // 2, CANVAS * 3 // 2)
    match kind:
        case "sea" | "desert" | "forest":
            rough, w, h = {"sea": (8, 9, 1), "desert": (14, 9, 1), "forest": (22, 4, 4)}[kind]
            for x, y in rng.integers(0, CANVAS, (90, 2)).tolist():
                pen.ellipse((x - w, y - h, x + w, y + h), fill=_near(cast(Color, image.getpixel((x, y))), rng, rough))
        case "fields":
            for x in range(0, CANVAS * 2, 24):
                for y in range(0, CANVAS * 2, 16):
                    pen.rectangle((x, y, x + 24, y + 16), fill=_near(_GROUND[kind], rng, 55))
        case "orchard" | "town" | "factory":
            gap = {"orchard": 9, "town": 14, "factory": 30}[kind]
            for x in range(3, CANVAS * 2, gap):
                for y in range(3, CANVAS * 2, gap):
                    w, h = (rng.uniform(0.3, 0.42, 2) * gap).tolist()
                    if kind == "orchard":
                        pen.ellipse((x - w, y - w, x + w, y + w), fill=_near((45, 85, 40), rng))
                    elif rng.random() < 0.85:
                        roof = (160, 80, 60) if kind == "town" else (190, 195, 205)
                        pen.rectangle((x - w, y - h, x + w, y + h), fill=_near(roof, rng, 35))
        case _:  # river, highway
            bend, phase = (10.0, rng.uniform(0, 6)) if kind == "river" else (0.0, 0.0)
            line = [(t, CANVAS / 2 + bend * float(np.sin(t / 9 + phase))) for t in span]
            pen.line(line, fill=_near({"river": (50, 90, 130)}.get(kind, (90, 90, 95)), rng, 15), width=9)
            if kind == "highway":
                pen.line(line, fill=(220, 220, 210), width=2)
    if kind in ("river", "highway", "fields"):  # any heading; the crop is the square that no turn leaves empty
        image = _tilt(image, rng, 180, 0).resize((CANVAS, CANVAS), box=(10, 10, CANVAS - 10, CANVAS - 10))
    return image


_PRINT = _glyphs(FONTS, ink=(170, 256), paper=(0, 120), neighbours="0123456789")
_LETTERS = _glyphs(FONTS, ink=(0, 90), paper=(140, 256))
_ICONS = _glyphs(FONTS[:1], ink=(200, 256), paper=(20, 170), turn=20)
_CHESS = _glyphs(FONTS[:2], ink=(0, 60), paper=(90, 230), turn=20)

TASKS: dict[str, MiniTask] = {
    task.name: task
    for task in (
        MiniTask("digits", tuple("0123456789"), (0.5, 0.85)),
        MiniTask("print", tuple("0123456789"), (0.5, 0.85), _PRINT),
        MiniTask("letters", tuple("ABCDEFGHKLMNPRST"), (0.48, 0.83), _LETTERS),
        MiniTask("textures", tuple(_FIELDS), (0.3, 0.65), _texture),
        MiniTask("signs", tuple(_BOARDS), (0.6, 0.93), _sign),
        MiniTask("land", tuple(_GROUND), (0.35, 0.7), _land),
        MiniTask("icons", tuple("♠♥♦♣★☀☎✈☂♫"), (0.6, 0.93), _ICONS),
        MiniTask("chess", tuple("♔♕♖♗♘♙"), (0.4, 0.75), _CHESS),
    )
}


@dataclass(frozen=True)
class Recipe:
    """How base and experts are trained: AdamW, one cycle (30 % rise), cross-entropy, images scaled to [-1, 1].

    The base learns all tasks at once, a backbone under one linear head per task, from clear pictures; then the heads
    are frozen. Each expert is a copy of the base, trained on its own task in fog: the transformer blocks alone, as the
    embedding of a large model hardly moves, and every other task in larger steps, as experts of different origin are.
    """

    base_images_per_task: int = 1000  # clear pictures, drawn from split "train"
    base_batch_per_task: int = 16  # a base step sees this many of every task; the loss is the mean over tasks
    base_steps: int = 400
    base_lr: float = 2e-3  # the peak of the cycle
    train_per_task: int = 1500  # pictures in fog for each expert
    batch_size: int = 64
    expert_steps: int = 300
    expert_lrs: tuple[float, ...] = (8e-4, 4e-3)  # in turn; high ones disturb the others, as experts of large models do
    tuned: tuple[str, ...] = ("blocks",)  # parts of the names of the tensors that experts change
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # on the norm of the whole gradient
    test_per_task: int = 500  # in fog; the handwritten digits have exactly this many
