"""Which axes of which tensors may be permuted together without changing the function that a network computes.

This is data: for each family of architectures, a table of patterns of names with a label for each axis. Axes of one
label are permuted alike; what adds up in a residual stream shares one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import EllipsisType

from adamerge.checkpoints import State
from adamerge.errors import InputError

Labels = tuple[str | EllipsisType | None, ...]


@dataclass(frozen=True)
class Axis:
    """An axis of `repeat` × n × inner entries, of which the n units of a label are permuted.

    Queries, keys and values in one tensor repeat three times; an attention head has many inner entries, as has a
    channel that is flattened into the inputs of a linear layer.

    Attributes:
        label: of the units.
        repeat: see above.
        reads: whether units are the inputs of a layer along it, instead of what a layer puts out.
    """

    label: str
    repeat: int = 1
    reads: bool = False


@dataclass(frozen=True)
class Symmetry:
    """The permutations that leave a network's function as it is.

    Attributes:
        axes: of every floating tensor, None for one that stays.
        sizes: the number of units n of each label.
    """

    axes: Mapping[str, tuple[Axis | None, ...]]
    sizes: Mapping[str, int]

    def places(self, label: str) -> list[tuple[str, int]]:
        """Tensors and axes of one label."""
        return [
            (name, number)
            for name, axes in self.axes.items()
            for number, axis in enumerate(axes)
            if axis is not None and axis.label == label
        ]


@dataclass(frozen=True)
class Family:
    """One family of architectures.

    Attributes:
        name: of the family.
        tensors: pattern of the end of a name -> labels; the first that fits counts. `{group}` is what the pattern's
            group of that name has found, `{before}` the stage before `{stage}`, `3 label` a label that repeats three
            times along the axis.
        joined: label -> another that is the same where a tensor (the third) is missing: a shortcut that adds.
    """

    name: str
    tensors: Mapping[str, Labels]
    joined: tuple[tuple[str, str, str], ...] = ()


_STAGES: dict[str, Labels] = {
    r"layer(?P<stage>\d)\.0\.downsample\.0\.weight": ("stage{stage}", "stage{before}"),
    r"layer(?P<stage>\d)\.0\.downsample\.1\.\w+": ("stage{stage}",),
    r"layer(?P<stage>\d)\.0\.conv1\.weight": ("{stage}.0.a", "stage{before}"),
    r"layer(?P<stage>\d)\.(?P<block>\d+)\.conv1\.weight": ("{stage}.{block}.a", "stage{stage}"),
    r"layer(?P<stage>\d)\.(?P<block>\d+)\.bn1\.\w+": ("{stage}.{block}.a",),
}
#: After all others: names inside stages end like these.
_ENDS: dict[str, Labels] = {
    r"conv1\.weight": ("stage0",),
    r"bn1\.\w+": ("stage0",),
    r"fc\.weight": (None, "stage4"),
    r"fc\.bias": (),
}
_BASIC: dict[str, Labels] = {
    r"layer(?P<stage>\d)\.(?P<block>\d+)\.conv2\.weight": ("stage{stage}", "{stage}.{block}.a"),
    r"layer(?P<stage>\d)\.(?P<block>\d+)\.bn2\.\w+": ("stage{stage}",),
}
_BOTTLENECK: dict[str, Labels] = {
    r"layer(?P<stage>\d)\.(?P<block>\d+)\.conv2\.weight": ("{stage}.{block}.b", "{stage}.{block}.a"),
    r"layer(?P<stage>\d)\.(?P<block>\d+)\.bn2\.\w+": ("{stage}.{block}.b",),
    r"layer(?P<stage>\d)\.(?P<block>\d+)\.conv3\.weight": ("stage{stage}", "{stage}.{block}.b"),
    r"layer(?P<stage>\d)\.(?P<block>\d+)\.bn3\.\w+": ("stage{stage}",),
}
_JOINED = (("stage1", "stage0", "layer1.0.downsample.0.weight"),)
_BLOCK = r"(layers|blocks)\.(encoder_layer_)?(?P<block>\d+)\."
#: Names of torchvision, timm and transformers (ViT and CLIP's tower).
_VIT: dict[str, Labels] = {
    _BLOCK + r"(attn\.qkv\.|self_attention\.in_proj_)(weight|bias)": ("3 {block}.heads", "stream"),
    _BLOCK + r"(self_attn|attention)\.[qkv]_proj\.(weight|bias)": ("{block}.heads", "stream"),
    _BLOCK + r"(attn\.proj|self_attention\.out_proj|self_attn\.out_proj|attention\.o_proj)\.weight": (
        "stream",
        "{block}.heads",
    ),
    _BLOCK + r"(attn\.proj|self_attention\.out_proj|self_attn\.out_proj|attention\.o_proj)\.bias": ("stream",),
    _BLOCK + r"mlp\.(fc1|0|linear_1)\.(weight|bias)": ("{block}.mlp", "stream"),
    _BLOCK + r"mlp\.(fc2|3|linear_2)\.weight": ("stream", "{block}.mlp"),
    _BLOCK + r"mlp\.(fc2|3|linear_2)\.bias": ("stream",),
    _BLOCK + r"(ln_|norm|layer_norm)[12]\.(weight|bias)": ("stream",),
    _BLOCK + r"(layernorm_(before|after)|ls[12])\.\w+": ("stream",),
    r"(patch_embed\.proj|conv_proj|patch_embedding|patch_embeddings\.projection)\.(weight|bias)": ("stream",),
    r"(cls_token|class_token|class_embedding|pos_embed|pos_embedding|position_embeddings)": (..., "stream"),
    r"position_embedding\.weight": (..., "stream"),
    r"(pre_layrnorm|post_layernorm|layernorm|norm|fc_norm|encoder\.ln)\.(weight|bias)": ("stream",),
    r"(head|heads\.head|classifier|visual_projection)\.weight": (None, "stream"),
    r"(head|heads\.head|classifier)\.bias": (),
}

FAMILIES = (
    Family("ResNet of basic blocks (torchvision)", _STAGES | _BASIC | _ENDS, _JOINED),
    Family("ResNet of bottlenecks (torchvision)", _STAGES | _BOTTLENECK | _ENDS, _JOINED),
    Family("ViT", _VIT),
)


def symmetry_of(state: State, heads: int | None = None) -> Symmetry:
    """The symmetry of a model that is of one of the `FAMILIES`: of the first that knows all of its tensors.

    `heads` is the number of attention heads, which no shape tells.

    Raises:
        InputError: for a model that no family knows, or whose shapes do not fit, and for a transformer without `heads`.
    """
    floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
    unknown = []
    for family in FAMILIES:
        found = {name: _labels(family, name) for name in floating}
        missing = [name for name, labels in found.items() if labels is None]
        if not missing:
            joined = {one: other for one, other, unless in family.joined if not any(n.endswith(unless) for n in state)}
            axes = {n: _axes(labels or (), state[n].dim(), joined) for n, labels in found.items()}
            return Symmetry(axes, _sizes(state, axes, heads))
        unknown.append(f"{family.name}: {missing[0]}")
    raise InputError(f"no family of architectures knows all tensors of this model ({'; '.join(unknown)})")


def chain(state: State) -> Symmetry:
    """The symmetry of layers that follow one another, as an MLP's or a VGG's; the state dict has them in their order.

    Tensors of one axis belong to the layer before them: biases, norms and their statistics.

    Raises:
        InputError: where the sizes of two layers do not follow one another.
    """
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    layers = [name for name, tensor in floating.items() if tensor.dim() > 1]
    labels = {name: f"layer{number}" for number, name in enumerate(layers[:-1])}
    axes: dict[str, tuple[Axis | None, ...]] = {}
    before: Axis | None = None
    current: Axis | None = None
    for name, tensor in floating.items():
        if name in layers:
            before = replace(current, reads=True) if current else None
            current = Axis(labels[name]) if name in labels else None
            axes[name] = (current, before, *[None] * (tensor.dim() - 2))
        else:
            axes[name] = (current,) * tensor.dim()
    return Symmetry(axes, _sizes(state, axes, None))


def _labels(family: Family, name: str) -> tuple[str | EllipsisType | None, ...] | None:
    for pattern, labels in family.tensors.items():
        if match := re.search(rf"(?:^|\.)(?:{pattern})$", name):
            groups = match.groupdict()
            groups |= {"before": str(int(groups["stage"]) - 1)} if "stage" in groups else {}
            return tuple(label.format(**groups) if isinstance(label, str) else label for label in labels)
    return None


def _axes(labels: Labels, count: int, joined: Mapping[str, str]) -> tuple[Axis | None, ...]:
    last = labels[:1] == (...,)
    named = [label for label in labels if not isinstance(label, EllipsisType)][:count]
    reads = [number > 0 and not last for number in range(len(named))]
    axes = [None if label is None else _axis(label, joined, read) for label, read in zip(named, reads, strict=True)]
    rest = [None] * (count - len(axes))
    return (*rest, *axes) if last else (*axes, *rest)


def _axis(label: str, joined: Mapping[str, str], reads: bool) -> Axis:
    repeat, _, name = label.rpartition(" ")
    return Axis(joined.get(name, name), int(repeat or 1), reads)


def _sizes(state: State, axes: Mapping[str, tuple[Axis | None, ...]], heads: int | None) -> dict[str, int]:
    """The number of units of each label: the smallest of its axes, or the heads; checks that all are multiples."""
    sizes: dict[str, int] = {}
    places = [(n, i, axis) for n, all_axes in axes.items() for i, axis in enumerate(all_axes) if axis is not None]
    for name, number, axis in places:
        size = state[name].shape[number] // axis.repeat
        if axis.label.endswith(".heads"):
            if heads is None:
                raise InputError("this model has attention heads: say how many, heads=12 say")
            size = heads
        sizes[axis.label] = min(size, sizes.get(axis.label, size))
    for name, number, axis in places:
        size, unit = state[name].shape[number], axis.repeat * sizes[axis.label]
        if size % unit:
            raise InputError(f"{name} has {size} entries along axis {number}, expected a multiple of {unit}")
    return sizes
