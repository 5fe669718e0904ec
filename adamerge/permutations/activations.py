"""Permutations found from what units do on data, and BatchNorm statistics taken anew."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from adamerge.errors import InputError
from adamerge.permutations.symmetries import Axis, Symmetry
from adamerge.permutations.weights import assign, check_same, match_weights
from adamerge.watching import evaluating, watching

_CHANNELS_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
#: Added to a unit's variance, relative to the largest: one that never changes correlates with nothing.
_FLOOR = 1e-12


@torch.no_grad()
def match_activations(
    reference: nn.Module,
    model: nn.Module,
    symmetry: Symmetry,
    batches: Iterable[Tensor],
    temperature: float | None = None,
) -> dict[str, Tensor]:
    """Permutations that pair the units of two networks by the correlation of what they put out on the same inputs.

    A label's correlations are summed over all modules whose outputs carry it, and its units assigned to those of the
    reference (Li et al., arXiv:1511.07543; Git Re-Basin, arXiv:2209.04836). Labels that no module shows, as heads
    inside `nn.MultiheadAttention`, are matched by weights. Both run in evaluation mode; memory does not grow with the
    number of batches.

    Args:
        reference: stays as it is.
        model: whose units are to be permuted.
        symmetry: of both.
        batches: inputs, without labels.
        temperature: for soft assignments (`transport`); None for permutations.

    Returns:
        By label, for `apply(model.state_dict(), symmetry, …)`.

    Raises:
        InputError: for networks of different names or shapes, and where there is no batch.
    """
    states = reference.state_dict(), model.state_dict()
    check_same(*states, symmetry)
    found = correlations(reference, model, symmetry, batches)
    order = {label: assign(score) for label, score in found.items()}
    if hidden := set(symmetry.sizes) - set(order):
        order = match_weights(*states, symmetry, start=order, labels=hidden)
    if temperature is None:
        return order
    return order | {label: transport(score, temperature) for label, score in found.items()}


def correlations(
    reference: nn.Module, model: nn.Module, symmetry: Symmetry, batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """By label, the correlations [n, n] of the reference's units with the model's, mean of the modules."""
    shown = {
        name.removesuffix(".weight"): axes[0]
        for name, axes in symmetry.axes.items()
        if name.endswith(".weight") and axes and axes[0] is not None
    }
    modules = set(dict(reference.named_modules()))
    shown = {name: axis for name, axis in shown.items() if name in modules}
    tallies: dict[str, _Tally] = {}
    with _outputs(reference, shown, symmetry) as ours, _outputs(model, shown, symmetry) as theirs:
        for batch in batches:
            for network, outputs in ((reference, ours), (model, theirs)):
                outputs.clear()
                network(batch)
            for name in ours.keys() & theirs.keys():
                tallies.setdefault(name, _Tally()).add(ours[name], theirs[name])
    if not tallies:
        raise InputError("no batch came, or no module showed its outputs: activations cannot be matched")
    by_label: dict[str, list[Tensor]] = {}
    for name in shown:
        if name in tallies:
            by_label.setdefault(shown[name].label, []).append(tallies[name].correlation())
    return {label: torch.stack(found).mean(0).cpu() for label, found in by_label.items()}


@torch.no_grad()
def transport(score: Tensor, temperature: float, steps: int = 200) -> Tensor:
    """A soft permutation [n, n]: the doubly stochastic matrix nearest exp(score / temperature), by Sinkhorn's steps.

    The transport map of OT fusion (arXiv:1910.05653) between units of equal weight; a low temperature makes it hard.
    """
    if not temperature > 0:
        raise InputError(f"temperature must be above 0, not {temperature}")
    logits = score.double() / temperature
    for _ in range(steps):
        logits = logits - logits.logsumexp(0, keepdim=True)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take the running statistics of all BatchNorm layers anew, as plain means over batches; changes the model.

    Units of a merge vary less than those of its parents, whose averaged statistics do not fit it (REPAIR,
    arXiv:2211.08403). Everything else is in evaluation mode meanwhile.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        try:
            for batch in batches:
                model(batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@dataclass
class _Tally:
    """Sums over examples of the features [rows, repeat, n, inner] of two networks."""

    count: int = 0
    sums: tuple[Tensor, Tensor] | None = None
    squares: tuple[Tensor, Tensor] | None = None
    products: Tensor | None = None

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        pair = ours.double(), theirs.double()
        sums = pair[0].sum(0), pair[1].sum(0)
        squares = pair[0].square().sum((0, 1, 3)), pair[1].square().sum((0, 1, 3))
        products = torch.einsum("brni,brmi->nm", *pair)
        if self.sums is None or self.squares is None or self.products is None:
            self.sums, self.squares, self.products = sums, squares, products
        else:
            self.sums = self.sums[0] + sums[0], self.sums[1] + sums[1]
            self.squares = self.squares[0] + squares[0], self.squares[1] + squares[1]
            self.products = self.products + products
        self.count += len(ours)

    def correlation(self) -> Tensor:
        """[n, n]; 0 for units that never change."""
        assert self.sums is not None
        assert self.squares is not None
        assert self.products is not None
        covariance = self.products - torch.einsum("rni,rmi->nm", *self.sums) / self.count
        spreads = []
        for sums, squares in zip(self.sums, self.squares, strict=True):
            variance = squares - sums.square().sum((0, 2)) / self.count
            alive = variance > _FLOOR * squares.max()
            spreads.append(torch.where(alive, variance, torch.inf).sqrt())
        return covariance / torch.outer(*spreads)


@contextmanager
def _outputs(model: nn.Module, shown: Mapping[str, Axis | None], symmetry: Symmetry) -> Iterator[dict[str, Tensor]]:
    """What modules put out in the last forward pass, [rows, repeat, n, inner], by name; in evaluation mode."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, _: object, output: Tensor) -> None:
        axis = shown[name]
        assert axis is not None
        channels = 1 if isinstance(module, _CHANNELS_SECOND) and output.dim() > 1 else -1
        rows = output.detach().movedim(channels, -1).flatten(0, -2)
        seen[name] = rows.unflatten(-1, (axis.repeat, symmetry.sizes[axis.label], -1))

    with watching(model, {name: partial(keep, name) for name in shown}):
        yield seen
