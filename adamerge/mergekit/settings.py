"""What a mergekit file asks for: slices of sources, and parameters that depend on model, layer and tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from adamerge.mergekit.methods import METHODS, Method
from adamerge.scales import interpolate


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose names contain `filter`; for all if it is None."""

    value: float | tuple[float, ...]
    filter: str | None = None


#: A number, numbers at even distances over the layers, or conditions of which the first that fits counts.
Setting: TypeAlias = float | tuple[float, ...] | tuple[Condition, ...]
Parameters: TypeAlias = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """A model, or the layers `start` to `stop` − 1 of it."""

    model: str
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output, each merged from one layer of every source; or all tensors of the models."""

    sources: tuple[Source, ...]
    base: str | None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """A whole file.

    Attributes:
        method: of `METHODS`.
        slices: of the output from the first layer to the last; one, whose sources have no layers, for whole models.
        parameters: for whatever slices and sources do not set.
        dtype: of the output; the base's if None.
        tokenizer: the model whose tokenizer the merge has, "base" or "union"; None where the file does not say.
        notes: what of the file has no effect here.
        file: as it was read.
    """

    method: str
    slices: tuple[Slice, ...]
    parameters: Parameters
    dtype: torch.dtype | None
    tokenizer: str | None
    notes: tuple[str, ...]
    file: Mapping[str, Any]

    @property
    def how(self) -> Method:
        """The method itself."""
        return METHODS[self.method]

    def value(self, parameter: str, name: str, t: float, slice_: Slice, source: Source | None = None) -> float | None:
        """A parameter for the tensor `name` at 0 ≤ t ≤ 1 of its slice: that of the source, else of the slice, ..."""
        levels = ([source.parameters] if source else []) + [slice_.parameters, self.parameters]
        for level in levels:
            if parameter in level and (found := _evaluate(level[parameter], name, t)) is not None:
                return found
        return None


def _evaluate(setting: Setting, name: str, t: float) -> float | None:
    if not isinstance(setting, tuple):
        return setting
    conditions = [entry for entry in setting if isinstance(entry, Condition)]
    if not conditions:
        return interpolate([entry for entry in setting if not isinstance(entry, Condition)], t)
    fitting = (entry.value for entry in conditions if entry.filter is None or entry.filter in name)
    return next((interpolate(value, t) for value in fitting), None)
