"""Which entries of a task vector a mergekit file keeps: one mask [*shape] for each of its ways to drop entries."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adamerge.rules.dare import by_rows, della_chances
from adamerge.rules.magnitudes import kth


def rescaled(delta: Tensor, mask: Tensor) -> Tensor:
    """The masked entries, scaled so that their magnitudes have the sum that all entries had."""
    masked = delta * mask
    before, after = delta.abs().sum(), masked.abs().sum()
    return masked * (before / after) if after > 0 else masked


def largest(values: Tensor, count: int) -> Tensor:
    """A mask of exactly `count` largest entries; of equal ones, those that come first."""
    flat = values.flatten()
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    least = kth(flat, flat.numel() - count + 1)
    mask = flat >= least
    if surplus := int(mask.count_nonzero()) - count:
        mask[(flat == least).nonzero()[-surplus:]] = False
    return mask.view(values.shape)


def _kept(delta: Tensor, density: float) -> int:
    """How many entries a density leaves: at least one, unless it is 0."""
    return max(int(density * delta.numel()), int(density > 0))


def magnitude(delta: Tensor, own: Mapping[str, float], draw: torch.Generator) -> Tensor:
    """The largest entries, as many as the density says."""
    return largest(delta.abs(), _kept(delta, own["density"]))


def random(delta: Tensor, own: Mapping[str, float], draw: torch.Generator) -> Tensor:
    """Drawn with the chance `density`."""
    return torch.rand(delta.shape, generator=draw).to(delta.device) < own["density"]


def outliers(delta: Tensor, own: Mapping[str, float], draw: torch.Generator) -> Tensor:
    """All but the largest `gamma` of the entries, and of these the largest until `density` of all are kept."""
    count, kept = delta.numel(), _kept(delta, own["density"])
    top = min(int(own["gamma"] * count), count - kept)
    return largest(delta.abs(), kept + top) & ~largest(delta.abs(), top)


def ranked(delta: Tensor, own: Mapping[str, float], draw: torch.Generator) -> Tensor:
    """Drawn with density − ε for the smallest entry of a row to density + ε for the largest, evenly by rank."""
    if own["density"] <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    drawn = torch.rand(delta.shape, generator=draw).to(delta.device)
    drop, window = 1 - own["density"], 2 * own["epsilon"]
    return by_rows(lambda rows: drawn[rows] < della_chances(delta[rows], drop, window), delta.shape)
