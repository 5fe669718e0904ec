"""Corrupted images: what cameras, compression and weather do to them, at five severities.

Kinds and constants are those of the robustness benchmark (Hendrycks & Dietterich, arXiv:1903.12261): of its CIFAR-10
version for sides below 100 pixels, of its ImageNet version for larger ones.
"""

import io
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adamerge.errors import InputError

#: From this side on, in pixels, an image has the constants of the benchmark's large images.
LARGE = 100


class Corruption(ABC):
    """image [3, H, W] in [0, 1] -> the same, corrupted. What is drawn comes from the generator that is given.

    Args:
        severity: from 1, slight, to 5.
    """

    #: A constant for each severity, of small and of large images.
    small: ClassVar[tuple[tuple[float, ...], ...]]
    large: ClassVar[tuple[tuple[float, ...], ...]]

    def __init__(self, severity: int = 3) -> None:
        if severity not in range(1, 6):
            raise InputError(f"severity is 1, 2, 3, 4 or 5, got {severity}")
        self.severity = severity

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        constants = self.small if min(image.shape[-2:]) < LARGE else self.large
        return self.corrupt(image, generator, *constants[self.severity - 1]).clamp(0, 1)

    @abstractmethod
    def corrupt(self, image: Tensor, generator: torch.Generator, *constants: float) -> Tensor:
        """The corrupted image, before it is clipped to [0, 1]."""


class GaussianNoise(Corruption):
    """x + c n, n ~ N(0, 1) in every channel of every pixel."""

    small = ((0.04,), (0.06,), (0.08,), (0.09,), (0.10,))
    large = ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))

    def corrupt(self, image: Tensor, generator: torch.Generator, *constants: float) -> Tensor:
        return image + constants[0] * torch.randn(image.shape, generator=generator)


class ImpulseNoise(Corruption):
    """Salt and pepper: a share c of all values becomes 0 or 1."""

    small = ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,))
    large = ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))

    def corrupt(self, image: Tensor, generator: torch.Generator, *constants: float) -> Tensor:
        hit, salt = torch.rand((2, *image.shape), generator=generator)
        return torch.where(hit < constants[0], (salt < 0.5).to(image.dtype), image)


class MotionBlur(Corruption):
    """The mean along a line at an angle between −45° and 45°, with weights exp(−i² / 2σ²), i = 0, ..., 2r, for (r, σ).

    Beyond its edges an image goes on as it ends there.
    """

    small = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))
    large = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))

    def corrupt(self, image: Tensor, generator: torch.Generator, *constants: float) -> Tensor:
        width, sigma = int(2 * constants[0] + 1), constants[1]
        angle = math.radians(90 * float(torch.rand((), generator=generator)) - 45)
        kernel = torch.zeros(2 * width - 1, 2 * width - 1)
        for i in range(width):
            row, column = round(i * math.sin(angle)), round(i * math.cos(angle))
            kernel[width - 1 + row, width - 1 + column] += math.exp(-(i**2) / (2 * sigma**2))
        return _convolve(image, kernel / kernel.sum())


class Contrast(Corruption):
    """m + c (x − m), with m the mean of each channel."""

    small = ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,))
    large = ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))

    def corrupt(self, image: Tensor, generator: torch.Generator, *constants: float) -> Tensor:
        mean = image.mean((1, 2), keepdim=True)
        return mean + constants[0] * (image - mean)


class Pixelate(Corruption):
    """Made smaller by a factor c and as large again, each by means over boxes."""

    small = ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,))
    large = ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))

    def corrupt(self, image: Tensor, generator: torch.Generator, *constants: float) -> Tensor:
        size = image.shape[-1], image.shape[-2]
        less = max(1, int(size[0] * constants[0])), max(1, int(size[1] * constants[0]))
        return _from_pil(_to_pil(image).resize(less, Image.Resampling.BOX).resize(size, Image.Resampling.BOX))


class Jpeg(Corruption):
    """Saved as JPEG of quality c."""

    small = ((80,), (65,), (58,), (50,), (40,))
    large = ((25,), (18,), (15,), (10,), (7,))

    def corrupt(self, image: Tensor, generator: torch.Generator, *constants: float) -> Tensor:
        file = io.BytesIO()
        _to_pil(image).save(file, "JPEG", quality=int(constants[0]))
        return _from_pil(Image.open(file))


class Spatter(Corruption):
    """Drops of water on the lens (severities 1 to 3) or of mud (4 and 5).

    Drops are where noise N(a, b²), smoothed by a Gaussian of width s, exceeds a level t. Water brightens,
    x + c · drops / max(drops) · (175, 238, 238) / 255, without the benchmark's relief at the edges of drops; mud, the
    drops smoothed once more by width c where that exceeds 0.8, covers the image with (63, 42, 20) / 255.
    """

    small = ((0.62, 0.1, 0.7, 0.7, 0.5, 0), (0.65, 0.1, 0.8, 0.7, 0.5, 0), (0.65, 0.3, 1, 0.69, 0.5, 0),
             (0.65, 0.1, 0.7, 0.69, 0.6, 1), (0.65, 0.1, 0.5, 0.68, 0.6, 1))  # fmt: skip
    large = ((0.65, 0.3, 4, 0.69, 0.6, 0), (0.65, 0.3, 3, 0.68, 0.6, 0), (0.65, 0.3, 2, 0.68, 0.5, 0),
             (0.65, 0.3, 1, 0.65, 1.5, 1), (0.67, 0.4, 1, 0.65, 1.5, 1))  # fmt: skip

    def corrupt(self, image: Tensor, generator: torch.Generator, *constants: float) -> Tensor:
        mean, spread, width, level, last, mud = constants
        noise = mean + spread * torch.randn((1, *image.shape[1:]), generator=generator)
        smooth = _blur(noise, width)
        drops = torch.where(smooth >= level, smooth, 0)
        if mud:
            cover = _blur((drops > level).to(image.dtype), last)
            cover = torch.where(cover < 0.8, 0, cover)
            return image * (1 - cover) + cover * _colour(63, 42, 20)
        return image + last * drops / drops.max().clamp(min=1e-12) * _colour(175, 238, 238)


#: The seven that test-time merging is measured on.
SEVEN: tuple[type[Corruption], ...] = (MotionBlur, ImpulseNoise, GaussianNoise, Pixelate, Spatter, Contrast, Jpeg)


def _colour(*rgb: int) -> Tensor:
    return torch.tensor(rgb).view(3, 1, 1) / 255


def _blur(image: Tensor, sigma: float) -> Tensor:
    """[C, H, W] smoothed by a Gaussian, cut off at four widths."""
    reach = int(4 * sigma + 0.5)
    line = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    line = line / line.sum()
    return _convolve(_convolve(image, line[None]), line[:, None])


def _convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """[C, H, W] correlated with a kernel of odd sides; beyond its edges the image goes on as it ends."""
    high, wide = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(image[None], (wide, wide, high, high), mode="replicate")
    return F.conv2d(padded, kernel.to(image).expand(len(image), 1, -1, -1), groups=len(image))[0]


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((255 * image).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 255
