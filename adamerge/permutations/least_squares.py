"""Layers of a merge that answer the mean of two networks' inputs with the mean of their outputs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamerge.errors import InputError
from adamerge.watching import watching

Rows = tuple[Tensor, Tensor]


@torch.no_grad()
def least_squares(
    first: nn.Module, aligned: nn.Module, batches: Iterable[Tensor], ridge: float = 1e-6
) -> dict[str, Tensor]:
    """The merge of two aligned networks by one regression for each layer (PLeaS, arXiv:2407.02447).

    Where the mean of two networks' weights answers smaller than either, the weights W of a layer, with its bias, are
    those of min Σ |W ½(x₁ + x₂) − ½(y₁ + y₂)|² over tokens or patches, for inputs x and outputs y of the layer in both.
    Linear layers and plain two-dimensional convolutions are solved for; everything else (norms, embeddings, what
    `nn.MultiheadAttention` does inside) is the mean. Both run in evaluation mode; memory does not grow with the number
    of batches. Statistics of BatchNorm are averaged: `recalibrate` them.

    Args:
        first: a network.
        aligned: another of its architecture, with its units in the order of the first's (`apply`).
        batches: inputs, without labels.
        ridge: pulls to the mean of both weights, as a fraction of the mean diagonal of Σ x xᵀ.

    Returns:
        A state dict of the networks' architecture.

    Raises:
        InputError: where there is no batch, and for a ridge that is not above 0.
    """
    if not ridge > 0:
        raise InputError(f"expected ridge > 0 in least_squares, got {ridge}")
    states = first.state_dict(), aligned.state_dict()
    mean = {n: torch.lerp(t, states[1][n].to(t), 0.5) if t.is_floating_point() else t for n, t in states[0].items()}
    layers = {name: module for name, module in first.named_modules() if _solvable(module)}
    sums: dict[str, Rows] = {}
    empty = True
    with _rows(first, layers) as ours, _rows(aligned, layers) as theirs:
        for batch in batches:
            empty = False
            for model, seen in ((first, ours), (aligned, theirs)):
                seen.clear()
                model(batch)
            for name in ours.keys() & theirs.keys():
                x, y = ((one + other) / 2 for one, other in zip(ours[name], theirs[name], strict=True))
                lacking = y - x @ _weights(mean, name).mT.to(x)
                parts = x.mT @ x, lacking.mT @ x
                sums[name] = (sums[name][0] + parts[0], sums[name][1] + parts[1]) if name in sums else parts
    if empty:
        raise InputError("no batch came: there is nothing to fit layers to")
    for name, (gram, moment) in sums.items():
        gram.diagonal().add_(ridge * float(gram.diagonal().mean()) or 1.0)
        better = _weights(mean, name).to(gram) + torch.linalg.solve(gram, moment, left=False)
        weight = mean[f"{name}.weight".lstrip(".")]
        mean[f"{name}.weight".lstrip(".")] = better[:, : weight[0].numel()].view(weight.shape).to(weight)
        if better.shape[1] > weight[0].numel():
            mean[f"{name}.bias".lstrip(".")] = better[:, -1].to(weight)
    return mean


def _solvable(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear) or (plain and isinstance(module.padding, tuple))


def _weights(state: dict[str, Tensor], name: str) -> Tensor:
    """[out, in (+ 1)]: a layer's weights, and its bias as one column more."""
    weight, bias = (state.get(f"{name}.{part}".lstrip(".")) for part in ("weight", "bias"))
    assert weight is not None
    flat = weight.flatten(1)
    return flat if bias is None else torch.cat([flat, bias.unsqueeze(1)], 1)


@contextmanager
def _rows(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[dict[str, Rows]]:
    """What layers took [rows, in (+ 1)] and put out [rows, out] in the last forward pass, in evaluation mode."""
    seen: dict[str, Rows] = {}

    def keep(name: str, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if name in seen:
            raise InputError(f"{name} runs several times in one pass: its inputs cannot be told apart")
        x, y = given[0].double(), output.double()
        if isinstance(module, nn.Conv2d):
            x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT  # type: ignore[arg-type]
            y = y.flatten(2).mT
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        seen[name] = (x if module.bias is None else F.pad(x, (0, 1), value=1.0)), y

    with watching(model, {name: partial(keep, name) for name in layers}):
        yield seen
