"""Where things are in a network, found by structure rather than by names: its MLPs and its residual blocks."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from adamerge import InputError


class Site(NamedTuple):
    """Layers that share their routing weights.

    Attributes:
        name: how coefficients, figures and messages call it.
        layers: names of the layers, in the order of the model; routing weights come from the input of the first.
        width: the last dimension of that input.
    """

    name: str
    layers: tuple[str, ...]
    width: int


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b: a Linear, or transformers' transposed Conv1D."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out], as transformers' Conv1D does."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), Tensor)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Input and output size of a linear layer."""
    out, into = linear.get_parameter("weight").shape
    return (out, into) if is_transposed(linear) else (into, out)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that are called as such; torch's attention uses its output projection without calling it."""
    uncalled = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {name: m for name, m in model.named_modules() if is_linear(m) and id(m) not in uncalled}


def mlps(model: nn.Module) -> list[Site]:
    """The MLPs: a layer D → H back from every H > D, with the layers H ← D that stand beside it.

    Works for CLIP of transformers and open_clip, timm, torchvision, BERT, GPT-2, T5 and gated MLPs.
    """
    layers, order = linears(model), [name for name, _ in model.named_modules()]
    sites: dict[str, Site] = {}
    for down, layer in layers.items():
        hidden, width = sizes(layer)
        if hidden <= width:
            continue
        for parent in _ancestors(down):
            ups = [name for name in layers if _inside(name, parent) and sizes(layers[name]) == (width, hidden)]
            if ups:
                place = parent if len([n for n in layers if _inside(n, parent)]) == len(ups) + 1 else _parent(ups[0])
                sites[place] = Site(place, tuple(sorted((*ups, down), key=order.index)), width)
                break
    if not sites:
        raise InputError(f"{type(model).__name__} has no MLP (layers D to H and back); give the router a scope pattern")
    return list(sites.values())


def matching(model: nn.Module, pattern: str) -> list[Site]:
    """One site per outermost module whose whole name matches a regular expression, with all its linear layers."""
    found: list[Site] = []
    layers = linears(model)
    for name, _ in model.named_modules():
        if re.fullmatch(pattern, name) and not any(_inside(name, other) for other, *_ in found):
            inside = tuple(layer for layer in layers if layer == name or _inside(layer, name))
            if inside:
                found.append(Site(name, inside, sizes(layers[inside[0]])[0]))
    if not found:
        some = ", ".join(list(layers)[:3])
        raise InputError(
            f"no module of {type(model).__name__} with linear layers matches {pattern!r}; it has {some} ..."
        )
    return found


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The residual blocks: members of the outermost stacks of modules of one class, each with parts of its own."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and not any(_inside(name, other) for other in found):
            members = dict(module.named_children())
            alike = len({type(m) for m in members.values()}) == 1
            if alike and all(
                any(True for _ in m.children()) and any(True for _ in m.parameters()) for m in members.values()
            ):
                found |= {f"{name}.{child}".lstrip("."): m for child, m in members.items()}
    if not found:
        raise InputError(f"{type(model).__name__} has no stack of blocks of one class")
    return found


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = _parent(name)
        yield name


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _inside(name: str, parent: str) -> bool:
    return bool(name) and name != parent and (not parent or name.startswith(f"{parent}."))
