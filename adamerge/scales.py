"""Numbers that depend on the tensor: one for all, a gradient over the blocks, or either by patterns of names."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from adamerge.errors import InputError
from adamerge.kinds import depths

#: The same number for every tensor, or numbers at even distances from the first block to the last.
Gradient: TypeAlias = float | Sequence[float]
#: A gradient, or one for each pattern: `{"self_attn": 0.4, "mlp": [0.2, 0.6], ".*": 0.3}`.
Scale: TypeAlias = Gradient | Mapping[str, Gradient]


def per_tensor(scale: Scale, names: Iterable[str]) -> dict[str, float]:
    """The number that a scale has for every tensor.

    A list is interpolated linearly over the depth of the blocks; tensors before the first block take its first number,
    those after the last block its last (`adamerge.kinds.depths`). Of a mapping, the first pattern found anywhere in a
    name (`re.search`) counts.

    Raises:
        InputError: for a pattern that no name has or that is no regular expression, for a tensor without a pattern,
            for an empty list, and for NaN and infinity.
    """
    names = list(names)
    depth = depths(names)
    if not isinstance(scale, Mapping):
        return {name: interpolate(scale, depth[name]) for name in names}
    chosen: dict[str, float] = {}
    for pattern, gradient in scale.items():
        for name in matching(pattern, names):
            chosen.setdefault(name, interpolate(gradient, depth[name]))
    for name in names:
        if name not in chosen:
            raise InputError(f"no pattern of the scale matches {name}: end with '.*' for what is left, '.*: 1.0' say")
    return {name: chosen[name] for name in names}


def check_pattern(pattern: str, owner: str) -> None:
    """Raise InputError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{owner}: {pattern!r} is no regular expression: {error}") from error


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names in which a pattern is found; InputError where there is none."""
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise InputError(f"{pattern!r} is no regular expression: {error}") from error
    if not found:
        raise InputError(f"no tensor has a name that matches {pattern!r}")
    return found


def interpolate(gradient: Gradient, at: float) -> float:
    """The number at 0 ≤ `at` ≤ 1 between the first and the last of a gradient."""
    numbers = gradient if isinstance(gradient, Sequence) else (gradient,)
    if not all(map(math.isfinite, numbers)):
        raise InputError(f"expected a scale to be finite, got {gradient}")
    if not isinstance(gradient, Sequence):
        return float(gradient)
    if not gradient:
        raise InputError("a list of scales needs at least one number")
    place = at * (len(gradient) - 1)
    left = min(int(place), max(len(gradient) - 2, 0))
    right = min(left + 1, len(gradient) - 1)
    return float(gradient[left] + (place - left) * (gradient[right] - gradient[left]))
