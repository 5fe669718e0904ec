"""Where things are in a network, found by structure rather than by names: its MLPs and its residual blocks."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from adamerge import InputError


class Site(NamedTuple):
    """Layers that share their routing weights.

    Attributes:
        name: how coefficients, figures and messages call it.
        layers: names of the layers, in the order of the model; routing weights come from the input of the one that is
            called first.
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
    """The linear layers that are called as such and whose weights are theirs alone.

    torch's attention uses its output projection without calling it; a language model's output layer may share its
    weight with the embedding.
    """
    uncalled = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    found = {name: m for name, m in model.named_modules() if is_linear(m) and id(m) not in uncalled}
    return {name: m for name, m in found.items() if uses[id(m.get_parameter("weight"))] == 1}


def routable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can have weights of their own for every sample: linear layers, LayerNorm, plain Conv2d."""
    linear, found = linears(model), {}
    for name, module in model.named_modules():
        conv = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
        norm = isinstance(module, nn.LayerNorm) and module.elementwise_affine and len(module.normalized_shape) == 1
        if name in linear or norm or (conv and not isinstance(module.padding, str)):
            found[name] = module
    return found


def mlps(model: nn.Module) -> list[Site]:
    """The MLPs: a layer H → D for every H > D, with the layers D → H that stand beside it, before it.

    Works for CLIP of transformers and open_clip, timm, torchvision, BERT, GPT-2, T5 and gated MLPs. Attention may have
    layers of the same sizes, where its heads together are wider than D; it is known by the name of its class.
    """
    attention = [name for name, m in model.named_modules() if name and type(m).__name__.endswith("Attention")]
    layers = {n: layer for n, layer in linears(model).items() if not any(_inside(n, parent) for parent in attention)}
    order = {name: number for number, name in enumerate(layers)}
    sites: dict[str, Site] = {}
    for down, layer in layers.items():
        hidden, width = sizes(layer)
        if hidden <= width:
            continue
        for parent in _ancestors(down):
            before = [name for name in layers if _inside(name, parent) and order[name] < order[down]]
            ups = [name for name in before if sizes(layers[name]) == (width, hidden)]
            if ups:
                place = parent if len([n for n in layers if _inside(n, parent)]) == len(ups) + 1 else _parent(ups[0])
                sites[place] = Site(place, (*ups, down), width)
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
