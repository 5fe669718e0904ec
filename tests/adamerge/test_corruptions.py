import math

import pytest
import torch

from adamerge import InputError
from adamerge.corruptions import (
    SEVEN,
    Contrast,
    GaussianNoise,
    ImpulseNoise,
    Jpeg,
    MotionBlur,
    Pixelate,
    Spatter,
)  # fmt: skip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(side: int = 32) -> torch.Tensor:
    """Smooth waves in three colours, in 8 bits."""
    x, y = torch.meshgrid(torch.linspace(0, 6, side), torch.linspace(0, 4, side), indexing="ij")
    waves = torch.stack([torch.sin(x + y), torch.cos(2 * x), torch.sin(3 * y)])
    return ((0.5 + 0.4 * waves) * 255).round() / 255


@pytest.mark.parametrize("kind", SEVEN)
@pytest.mark.parametrize("side", [32, 128])
def test_corruptions_get_worse_are_reproducible_and_stay_images(kind, side):
    clean = picture(side)
    seen = [kind(severity)(clean, rng()) for severity in range(1, 6)]
    for image in seen:
        assert image.shape == clean.shape
        assert image.dtype == clean.dtype
        assert image.min() >= 0
        assert image.max() <= 1
    distances = [(image - clean).abs().mean().item() for image in seen]
    assert 0 < distances[0] < distances[4]
    assert torch.equal(seen[2], kind(3)(clean, rng()))
    if kind in (GaussianNoise, ImpulseNoise, MotionBlur, Spatter):
        assert not torch.equal(seen[2], kind(3)(clean, rng(1)))
    assert torch.equal(clean, picture(side))


@pytest.mark.parametrize(("side", "sigma"), [(64, 0.08), (128, 0.18)])
def test_gaussian_noise_has_the_benchmark_s_width_for_small_and_large_images(side, sigma):
    grey = torch.full((3, side, side), 0.5)
    noise = GaussianNoise(3).corrupt(grey, rng(), sigma) - grey
    assert noise.std().item() == pytest.approx(sigma, rel=0.02)
    assert GaussianNoise(3)(grey, rng()).equal((grey + noise).clamp(0, 1))


def test_impulse_noise_hits_its_share_of_values_with_black_and_white_alike():
    hit = ImpulseNoise(5)(torch.full((3, 90, 90), 0.5), rng())
    assert (hit != 0.5).float().mean().item() == pytest.approx(0.07, rel=0.1)
    assert (hit == 1).float().mean().item() == pytest.approx(0.035, rel=0.1)
    assert set(hit.unique().tolist()) == {0, 0.5, 1}


def test_contrast_shrinks_every_channel_around_its_mean():
    clean = picture()
    less = Contrast(2)(clean, rng())
    torch.testing.assert_close(less.mean((1, 2)), clean.mean((1, 2)))
    torch.testing.assert_close(less.std((1, 2)), 0.5 * clean.std((1, 2)))


def test_motion_blur_spreads_a_point_along_a_line_of_half_a_gaussian():
    point = torch.zeros(3, 65, 65)
    point[:, 32, 32] = 1
    blurred = MotionBlur(5)(point, rng())
    assert blurred.sum((1, 2)).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    weights = torch.tensor([math.exp(-(i**2) / (2 * 2.5**2)) for i in range(19)])
    values = blurred[0][blurred[0] > 1e-9].sort(descending=True).values  # far ones are below what floats resolve
    torch.testing.assert_close(values[:8], (weights / weights.sum())[:8])


@pytest.mark.parametrize("kind", [MotionBlur, Pixelate, Contrast, Jpeg])
def test_a_plain_image_has_nothing_to_blur(kind):
    plain = torch.full((3, 32, 32), 102 / 255)
    torch.testing.assert_close(kind(5)(plain, rng()), plain, atol=1.5 / 255, rtol=0)


def test_water_brightens_and_mud_covers_with_brown():
    white = torch.ones(3, 64, 64)
    assert torch.equal(Spatter(3)(white, rng()), white)
    assert (Spatter(3)(0.2 * white, rng()) >= 0.2 - 1e-6).all()
    muddy = Spatter(5)(white, rng())
    spot = muddy[:, muddy[0].flatten().argmin() // 64, muddy[0].flatten().argmin() % 64]
    torch.testing.assert_close(spot, torch.tensor([63, 42, 20]) / 255, atol=0.2, rtol=0)


def test_another_severity_is_refused():
    with pytest.raises(InputError, match="severity is 1, 2, 3, 4 or 5, got 6"):
        Jpeg(6)
