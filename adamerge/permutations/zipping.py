"""Two networks whose units are joined by what they do, those of one network among themselves too."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adamerge.checkpoints import State
from adamerge.errors import InputError
from adamerge.permutations.activations import correlations
from adamerge.permutations.symmetries import Axis, Symmetry
from adamerge.permutations.weights import check_same, match_weights, permute


@dataclass(frozen=True)
class Zipped:
    """A network with two ends.

    Attributes:
        shared: the tensors that both networks have become one in.
        own: by network, all others.
    """

    shared: dict[str, Tensor]
    own: tuple[dict[str, Tensor], dict[str, Tensor]]

    def state(self, which: int) -> dict[str, Tensor]:
        """A state dict of the networks' architecture: what is shared, with the end of the one or the other, 0 or 1."""
        return self.shared | self.own[which]


@torch.no_grad()
def zip_units(
    first: nn.Module,
    second: nn.Module,
    symmetry: Symmetry,
    batches: Sequence[Tensor],
    labels: Collection[str] | None = None,
) -> Zipped:
    """Join the 2n units of two networks in pairs to n, those that correlate most first (ZipIt!, arXiv:2305.03053).

    A pair may be of one network, where that has units for the same or the other nothing like them: networks for
    different tasks need not match one to one. A unit is made as the mean of its pair, and read where either was. What
    makes no such unit, as the layer that puts out logits, stays apart for each network. With the first `labels` only,
    all later layers do: a part of the network is shared, and each task has its end. Labels that no module shows (heads
    inside `nn.MultiheadAttention`) are paired across the networks by weights. Statistics of BatchNorm are averaged:
    `recalibrate` them. `match_activations` is the case of pairs across the networks alone.

    Args:
        first: a network.
        second: another of its architecture.
        symmetry: of both.
        batches: inputs, without labels, of both tasks.
        labels: of the units to join; by default all.

    Raises:
        InputError: for networks of different names or shapes, labels that are none, without batches, and where units
            that are joined are made of some that are not.
    """
    states = first.state_dict(), second.state_dict()
    check_same(*states, symmetry)
    wanted = set(symmetry.sizes if labels is None else labels)
    if unknown := sorted(wanted - set(symmetry.sizes)):
        raise InputError(f"{unknown[0]!r} is no label of these networks; they have {', '.join(symmetry.sizes)}")
    blocks = {pair: correlations(*pair, symmetry, batches) for pair in ((first, first), (first, second), (second,) * 2)}
    same, across, other = blocks.values()
    joined = {label: _joining(pairs(_square(same[label], across[label], other[label]))) for label in across}
    if hidden := wanted - set(joined):
        for label, order in match_weights(*states, symmetry, labels=hidden).items():
            if label in hidden:
                joined[label] = _joining(torch.stack([torch.arange(len(order)), len(order) + order], 1))
    return _zipped(states, symmetry, {label: joined[label] for label in wanted})


def pairs(score: Tensor) -> Tensor:
    """[n, 2] of 2n units, each in one pair: always the two with the largest score [2n, 2n] of those that are left."""
    count = len(score)
    rows, columns = torch.triu_indices(count, count, 1)
    order = score[rows, columns].argsort(descending=True, stable=True)
    free, found = [True] * count, []
    for one, other in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if free[one] and free[other]:
            free[one] = free[other] = False
            found.append((one, other))
    return torch.tensor(found)


def _square(same: Tensor, across: Tensor, other: Tensor) -> Tensor:
    return torch.cat([torch.cat([same, across], 1), torch.cat([across.mT, other], 1)])


def _joining(found: Tensor) -> tuple[Tensor, Tensor]:
    """For each network, [n, n] with ½ where a unit of the outcome has one of its units."""
    count = len(found)
    joining = torch.zeros(count, 2 * count, dtype=torch.float64)
    joining.scatter_(1, found, 0.5)
    return joining[:, :count], joining[:, count:]


def _zipped(states: tuple[State, State], symmetry: Symmetry, joined: dict[str, tuple[Tensor, Tensor]]) -> Zipped:
    shared: dict[str, Tensor] = {}
    own: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name in states[0]:
        axes = symmetry.axes.get(name, ())
        reading = tuple(axis if axis and axis.reads else None for axis in axes)
        making = tuple(axis if axis and not axis.reads else None for axis in axes)
        made = [axis.label for axis in making if axis and axis.label in joined]
        apart = [axis.label for axis in reading if axis and axis.label not in joined]
        if made and apart:
            raise InputError(f"{name} makes {made[0]!r} of {apart[0]!r}: join the units of both, or of neither")
        both = [
            _in_joined_units(states[k][name], reading, making, symmetry, {label: joined[label][k] for label in joined})
            for k in (0, 1)
        ]
        if made:
            shared[name] = both[0] + both[1]
        else:
            own[0][name], own[1][name] = both
    return Zipped(shared, own)


def _in_joined_units(
    tensor: Tensor,
    reading: tuple[Axis | None, ...],
    making: tuple[Axis | None, ...],
    symmetry: Symmetry,
    joining: dict[str, Tensor],
) -> Tensor:
    # A unit is read with the sum of the weights of its pair, and made as their mean.
    tensor = permute(tensor, reading, symmetry, {label: 2 * halves for label, halves in joining.items()})
    return permute(tensor, making, symmetry, joining)
