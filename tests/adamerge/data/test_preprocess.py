"""Preprocess: closed-form values, agreement with CLIP's transform, and single images against batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from adamerge import InputError
from adamerge.data import Preprocess
from adamerge.data.preprocess import InBytes

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_values_are_those_of_the_formula():
    x = Preprocess(mean=MEAN, std=STD)(np.array([[[0, 51, 255]]], dtype=np.uint8))
    assert x.shape == (3, 1, 1)
    torch.testing.assert_close(x.flatten(), torch.tensor([-2.0, -1.0, 1.0]))


def test_default_maps_bytes_to_minus_one_to_one():
    x = Preprocess()(np.array([[0, 255]], dtype=np.uint8))
    assert x.tolist() == [[[-1.0, 1.0]]] * 3  # grayscale, in three channels


@pytest.mark.parametrize(("height", "width"), [(40, 57), (57, 40), (16, 24), (9, 12), (24, 16), (16, 16)])
def test_resize_and_crop_are_those_of_clip(height, width):
    image = Image.fromarray(noise(height, width, 3))
    clip = transforms.Compose(
        [
            transforms.Resize(16, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    torch.testing.assert_close(Preprocess(16, MEAN, STD)(image), clip(image))


@pytest.mark.parametrize("size", [None, 8, 5, 12])
@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8), (8, 8, 1), (7, 10, 3), (10, 7)])
def test_batch_equals_single_images(size, shape):
    preprocess, images = Preprocess(size, MEAN, STD), noise(4, *shape)
    batch = preprocess.batch(images)
    pictures = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]
    assert torch.equal(batch, torch.stack([preprocess(image) for image in images]))
    assert torch.equal(batch, torch.stack([preprocess(picture) for picture in pictures]))
    assert torch.equal(batch, preprocess.batch(torch.tensor(images)))
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()


def test_arguments_are_left_alone():
    array, tensor = noise(2, 4, 4, 3), torch.tensor(noise(2, 4, 4, 3))
    array.setflags(write=False)  # as memory maps are
    before = tensor.clone()
    Preprocess().batch(array)
    Preprocess().batch(tensor)
    assert torch.equal(tensor, before)


def test_no_images_make_an_empty_batch():
    assert Preprocess().batch(noise(0, 4, 6, 3)).shape == (0, 3, 4, 6)
    assert Preprocess(8).batch(noise(0, 4, 6, 3)).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = Image.fromarray(noise(6, 6, 3)).convert("RGB").convert(mode)
    assert Preprocess(4)(image).shape == (3, 4, 4)


def test_palette_with_transparency_gives_no_warning():
    image = Image.new("P", (4, 4), color=1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.info["transparency"] = b"\x00\x80"
    assert Preprocess()(image)[:, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_16_bits_are_scaled_and_not_clipped():
    image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert image.mode == "I;16"
    assert torch.equal(Preprocess()(image), Preprocess()(np.array([[0, 100, 255]], dtype=np.uint8)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 8, 8), r"got float32 \[3, 8, 8\]; give them without a transform"),
        (np.zeros((3, 8, 8), dtype=np.uint8), r"uint8 \[H, W, 3\] or \[H, W\], got uint8 \[3, 8, 8\]"),
        (np.zeros((8, 8, 3)), "got float64"),
        (Image.new("F", (4, 4)), "mode F has no known range"),
        (Image.new("I", (4, 4)), "mode I has no known range"),
        ("cat.png", "expected a PIL image or a uint8 array, got str"),
    ],
)
def test_other_images_are_refused(image, message):
    with pytest.raises(InputError, match=message):
        Preprocess()(image)


def test_bad_options_are_refused():
    with pytest.raises(InputError, match="size must be positive, got 0"):
        Preprocess(size=0)
    with pytest.raises(InputError, match="3 positive stds"):
        Preprocess(std=(1.0, 0.0, 1.0))


def test_equal_options_make_equal_objects():
    assert Preprocess(8) == Preprocess(8) != Preprocess(9)
    assert len({Preprocess(8), Preprocess(8)}) == 1


def test_bytes_are_what_floats_are_made_of():
    """All values a byte may have, through (x / 255 − mean) / std in the order of the formula, in float32."""
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    floats, pixels = Preprocess(None, MEAN, STD).batch(images), InBytes(None, MEAN, STD).batch(images)
    assert pixels.dtype == torch.uint8
    assert pixels.equal(torch.from_numpy(images).permute(0, 3, 1, 2))
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (MEAN, STD))
    expected = (images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - mean) / std
    assert floats.numpy().tobytes() == expected.tobytes()
    assert Preprocess(None, MEAN, STD).normalize(pixels).equal(floats)
    assert InBytes(12, MEAN, STD)(noise(20, 14, 3)).dtype == torch.uint8
