"""From images to what a backbone takes: resized, cropped, scaled and normalised."""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from adamerge.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8] | Tensor
Stats = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocess:
    """x -> (crop(resize(x)) / 255 − mean) / std, as CLIP's: shortest side bicubic, antialiased; then the middle square.

    Images are RGB; grayscale is repeated into three channels, transparency is dropped, 16 bits are scaled to 8.

    Attributes:
        size: side of the resulting square; `None` leaves images as they are.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
    """

    size: int | None = None
    mean: Stats = (0.5, 0.5, 0.5)
    std: Stats = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise InputError(f"preprocess: size must be positive, got {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise InputError(f"preprocess: expected 3 means and 3 positive stds, got mean={self.mean}, std={self.std}")

    def __call__(self, image: "Image | Pixels") -> Tensor:
        """A PIL image, or uint8 [H, W, 3] or [H, W] -> float [3, size, size].

        Raises InputError for other shapes and types, among them tensors that a transform has made already.
        """
        if isinstance(image, (np.ndarray, Tensor)):
            return self.batch(image[None])[0]
        if not hasattr(image, "convert"):
            raise InputError(f"expected a PIL image or a uint8 array, got {type(image).__name__}")
        return self._finish(_tensor(np.asarray(self._resize(to_rgb(image))))[None])[0]

    def batch(self, images: Pixels) -> Tensor:
        """uint8 [N, H, W, 3] or [N, H, W] -> float [N, 3, size, size], or [N, 3, H, W] without a size.

        Equals stacked single images. Raises InputError for other shapes and types.
        """
        pixels = _tensor(images)
        if pixels.dtype != torch.uint8 or not (pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[-1] in (1, 3))):
            got = f"{str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape[1:])}"
            raise InputError(f"expected images as uint8 [H, W, 3] or [H, W], got {got}; give them without a transform")
        pixels = pixels if pixels.ndim == 4 else pixels[..., None]
        if self.size is not None and pixels.shape[1:3] != (self.size, self.size):
            pixels = self._resize_all(pixels, self.size)
        return self._finish(pixels.expand(-1, -1, -1, 3))

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float of the same shape, the same bits on every device."""
        most, mean, std = _constants(self.mean, self.std, pixels.device)
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(most).sub_(mean).div_(std)

    def _finish(self, pixels: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] of the right size -> [N, 3, H, W]."""
        return self.normalize(pixels.permute(0, 3, 1, 2))

    def _resize_all(self, pixels: Tensor, size: int) -> Tensor:
        """[N, H, W, C] -> [N, size, size, C]."""
        from PIL import Image

        resized = np.empty((len(pixels), size, size, pixels.shape[-1]), dtype=np.uint8)
        for out, one in zip(resized, pixels.numpy(), strict=True):
            image = Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one)
            out[:] = np.asarray(self._resize(image)).reshape(out.shape)
        return torch.from_numpy(resized)

    def _resize(self, image: "Image") -> "Image":
        """Shortest side to `size`, then the middle square; nothing if `size` is not given or met."""
        from PIL import Image

        if self.size is None or image.size == (self.size, self.size):
            return image
        short = min(image.size)
        width, height = (self.size * side // short for side in image.size)
        if short != self.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)  # Pillow antialiases when it shrinks
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


class InBytes(Preprocess):
    """The same but for the last part: uint8 [N, 3, H, W], a quarter of the size, of which `normalize` makes floats."""

    def _finish(self, pixels: Tensor) -> Tensor:
        return pixels.permute(0, 3, 1, 2).contiguous()


@cache
def _constants(mean: Stats, std: Stats, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, means and deviations. A GPU would multiply by the inverse of a number that is not on it."""
    with torch.inference_mode(False):
        means, stds = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        return torch.tensor(255.0, device=device), means, stds


def to_rgb(image: "Image") -> "Image":
    """Any PIL image in RGB. Raises InputError for images of integers or floats, whose range is anyone's guess."""
    from PIL import Image

    if image.mode.startswith("I;16"):  # Pillow itself would clip them to white
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(f"an image of mode {image.mode} has no known range: save it with 8 or 16 bits per channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _tensor(array: Any) -> Tensor:
    """A tensor of its own memory: arrays of Pillow and of memory maps are read-only, which torch warns of."""
    return array if isinstance(array, Tensor) else torch.tensor(array)
