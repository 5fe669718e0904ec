"""Which tensor of which model goes where: whole models, or layers stacked anew."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adamerge.checkpoints import State, meta, rows_of
from adamerge.errors import InputError
from adamerge.kinds import role
from adamerge.mergekit.settings import Settings, Slice, Source

_LAYER = re.compile(r"((?:.*?\.)?)(\d+)(\..+)")


@dataclass(frozen=True)
class Cast:
    """Who is what in a slice.

    Attributes:
        base: its tensors are the base of the task vectors; the first source where the file names no base model.
        experts: what is merged; none where the slice is its base.
        based: whether the file names the base.
    """

    base: Source
    experts: tuple[Source, ...]
    based: bool


@dataclass(frozen=True)
class Output:
    """One tensor of the merge.

    Attributes:
        name: in the merge.
        slice: that it is in.
        cast: of the slice.
        t: its place in the slice, from 0 for the first layer to 1 for the last; 0 too for what lies outside the layers,
            head and final norm included, as in mergekit.
        base: its name in the base.
        experts: its name in each of the experts.
    """

    name: str
    slice: Slice
    cast: Cast
    t: float
    base: str
    experts: tuple[str, ...]


class Assembled(Mapping[str, Tensor]):
    """A lazy state put together from others: `parts` maps a name to a state and the name that the tensor has there."""

    def __init__(self, parts: Mapping[str, tuple[State, str]]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Tensor:
        state, own = self._parts[name]
        return state[own]

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def rows(self, name: str, rows: slice) -> Tensor:
        """As `rows_of(state, name, rows)`."""
        state, own = self._parts[name]
        return rows_of(state, own, rows)

    def meta(self, name: str) -> Tensor:
        """As `meta(state, name)`."""
        state, own = self._parts[name]
        return meta(state, own)


def cast(settings: Settings, part: Slice) -> Cast:
    """Tell base and experts apart; raises InputError for a model listed twice and for too few or too many."""
    how, sources = settings.how, part.sources
    if how.base == "unused" and part.base is not None and all(source.layers is None for source in sources):
        # mergekit counts a base model that is not listed among the models; of slices, it takes what they list.
        listed = any(source.model == part.base for source in sources)
        sources = sources if listed else (*sources, Source(part.base, None, {}))
    by_model = {source.model: source for source in sources}
    if len(by_model) < len(sources):
        raise InputError(f"a model is listed twice: {', '.join(source.model for source in sources)}")
    alone = len(sources) == 1 and sources[0].layers is not None
    if alone and how.base != "unused" and how.models[0] > 0:  # nothing to interpolate: the layers as they are
        return Cast(sources[0], (), based=True)
    if how.base == "unused" or part.base is None:
        found = Cast(sources[0], sources, based=False)
    elif part.base in by_model:
        others = tuple(source for source in sources if source.model != part.base)
        found = Cast(by_model[part.base], others, based=True)
    else:
        ranges = {source.layers for source in sources}
        if len(ranges) > 1:
            raise InputError(
                f"a slice takes different layers of {', '.join(by_model)}: list the base model {part.base} among its "
                "sources, with the layer_range that is its own"
            )
        found = Cast(Source(part.base, ranges.pop(), {}), sources, based=True)
    least, most = how.models
    if not least <= len(found.experts) <= most:
        count = str(least) if least == most else f"at least {least}"
        beside = " besides the base_model" if found.based else " with the base_model" if part.base else ""
        raise InputError(f"{settings.method} takes {count} models{beside}, got {len(found.experts)}")
    return found


def whole(settings: Settings, states: Mapping[str, State]) -> list[Output]:
    """The tensors of a merge of whole models: those of the base, under their names."""
    part = settings.slices[0]
    who = cast(settings, part)
    names = list(states[who.base.model])
    places = {name: (found[1], int(found[2])) for name in names if (found := _LAYER.match(name))}
    last: dict[str, int] = {}
    for stack, index in places.values():
        last[stack] = max(index, last.get(stack, 0))
    outputs = []
    for name in names:
        stack, index = places.get(name, ("", 0))
        t = _t(index, last[stack] + 1) if name in places else 0.0
        outputs.append(Output(name, part, who, t, name, (name,) * len(who.experts)))
    return outputs


def stacked(settings: Settings, states: Mapping[str, State]) -> list[Output]:
    """The tensors of slices on top of each other; what lies before the layers is that of the first slice's sources,
    what comes after them that of the last's.

    Raises:
        InputError: for models with several stacks of layers, or with tensors in a layer that others do not have.
    """
    stacks = {model: _Layers(model, state) for model, state in states.items()}
    prefixes = {layers.prefix for layers in stacks.values()}
    if len(prefixes) > 1:
        raise InputError(f"the models name their layers differently: {', '.join(sorted(prefixes))}")
    prefix = prefixes.pop()
    casts = [cast(settings, part) for part in settings.slices]
    outputs = _outside(settings.slices[0], casts[0], stacks, after=False)
    count = 0
    for part, who in zip(settings.slices, casts, strict=True):
        start, stop = _range(who.base)
        for offset in range(stop - start):
            for rest in stacks[who.base.model].layer(start + offset):
                names = [f"{prefix}{_range(source)[0] + offset}{rest}" for source in (who.base, *who.experts)]
                t = _t(offset, stop - start)
                outputs.append(Output(f"{prefix}{count}{rest}", part, who, t, names[0], tuple(names[1:])))
            for source in who.experts:
                index = _range(source)[0] + offset
                _same(stacks[who.base.model].layer(start + offset), who, source, stacks[source.model].layer(index))
            count += 1
    return outputs + _outside(settings.slices[-1], casts[-1], stacks, after=True)


def layers(settings: Settings) -> list[tuple[str, int]]:
    """Model and index of the layer that each layer of stacked slices has its shape from."""
    found = []
    for part in settings.slices:
        base = cast(settings, part).base
        found += [(base.model, index) for index in range(*_range(base))]
    return found


class _Layers:
    """The tensors of a model with one stack of layers."""

    def __init__(self, model: str, state: State) -> None:
        self.model, self.outside = model, list[str]()
        self._layers: dict[int, list[str]] = {}
        prefixes = set()
        for name in state:
            if found := _LAYER.match(name):
                prefixes.add(found[1])
                self._layers.setdefault(int(found[2]), []).append(found[3])
            else:
                self.outside.append(name)
        if len(prefixes) != 1:
            stacks = f"several stacks of layers ({', '.join(sorted(prefixes))})" if prefixes else "no numbered layers"
            raise InputError(f"{model} has {stacks}: merge it whole, with `models` instead of `slices`")
        self.prefix: str = prefixes.pop()

    def layer(self, index: int) -> list[str]:
        if index not in self._layers:
            raise InputError(f"{self.model} has {len(self._layers)} layers: there is no layer {index}")
        return self._layers[index]


def _outside(part: Slice, who: Cast, stacks: Mapping[str, _Layers], after: bool) -> list[Output]:
    def chosen(source: Source) -> list[str]:
        return [n for n in stacks[source.model].outside if (role(n) in ("head", "final")) == after]

    names = chosen(who.base)
    for source in who.experts:
        _same(names, who, source, chosen(source))
    return [Output(name, part, who, 0.0, name, (name,) * len(who.experts)) for name in names]


def _same(names: Sequence[str], who: Cast, source: Source, own: Sequence[str]) -> None:
    if odd := sorted(set(names) ^ set(own)):
        owner = who.base.model if odd[0] in names else source.model
        raise InputError(f"{who.base.model} and {source.model} do not have the same tensors: only {owner} has {odd[0]}")


def _range(source: Source) -> tuple[int, int]:
    assert source.layers is not None  # slices always give one
    return source.layers


def _t(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0
