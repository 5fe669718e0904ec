"""Augmentation of image batches, a pure function of its key."""

import torch
from torch import Tensor

from trainers.seeding import generator


def shift_and_flip(images: Tensor, shift: int, flip: bool, key: tuple[object, ...]) -> Tensor:
    """Move each image [B, 3, H, W] by up to `shift` pixels either way (edges repeat) and mirror half of them."""
    if not shift and not flip:
        return images
    rng = generator(*key)
    count, _, height, width = images.shape
    moves = torch.randint(-shift, shift + 1, (2, count, 1), generator=rng)
    mirrored = torch.rand(count, 1, generator=rng) < 0.5 if flip else torch.zeros(count, 1, dtype=torch.bool)
    rows = (torch.arange(height) + moves[0]).clamp(0, height - 1).to(images.device)
    columns = torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    columns = (columns + moves[1]).clamp(0, width - 1).to(images.device)
    item = torch.arange(count, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[item, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
