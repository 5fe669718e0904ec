"""Permutations applied to a state dict, and found from weights alone."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from adamerge.checkpoints import State
from adamerge.errors import InputError
from adamerge.permutations.symmetries import Axis, Symmetry

#: By label: [n], unit i of the outcome is unit p[i] of the argument; or a soft one, [n, n], Σⱼ pᵢⱼ of the units j.
Permutations = Mapping[str, Tensor]


@torch.no_grad()
def apply(state: State, symmetry: Symmetry, permutations: Permutations) -> dict[str, Tensor]:
    """A state dict with its units in another order; labels without a permutation stay. Nothing is changed in place.

    Hard permutations leave the function as it is; soft ones (`transport`) mix units and do not.
    """
    permuted = dict(state)
    for name, axes in symmetry.axes.items():
        permuted[name] = permute(state[name], axes, symmetry, permutations)
    return permuted


def permute(
    tensor: Tensor,
    axes: tuple[Axis | None, ...],
    symmetry: Symmetry,
    permutations: Permutations,
    leave: int | None = None,
) -> Tensor:
    """One tensor with its axes permuted, but for axis `leave`."""
    for number, axis in enumerate(axes):
        if axis is None or number == leave or axis.label not in permutations:
            continue
        order = permutations[axis.label].to(tensor.device)
        units = tensor.unflatten(number, (axis.repeat, symmetry.sizes[axis.label], -1))
        if order.dim() == 1:
            units = units.index_select(number + 1, order)
        else:
            mixed = torch.tensordot(order.to(units.dtype), units, dims=([1], [number + 1]))
            units = mixed.movedim(0, number + 1)
        tensor = units.flatten(number, number + 2)
    return tensor


@torch.no_grad()
def match_weights(
    reference: State,
    state: State,
    symmetry: Symmetry,
    seed: int = 0,
    start: Permutations | None = None,
    labels: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Permutations that bring a network's weights next to those of another (Git Re-Basin, arXiv:2209.04836).

    Maximises Σ ⟨θ_ref, P θ⟩ over all tensors by coordinate ascent: with all others fixed, the best permutation of one
    label is a linear assignment. Each step gains, so that it ends, in a local optimum.

    Args:
        reference: stays as it is.
        state: what is to be permuted.
        symmetry: of both.
        seed: of the order in which labels are visited.
        start: permutations to begin with; by default none.
        labels: those to find, by default all; others stay as in `start`.

    Returns:
        By label, for `apply(state, symmetry, …)`.

    Raises:
        InputError: for networks of different names or shapes.
    """
    check_same(reference, state, symmetry)
    order = {label: torch.arange(size) for label, size in symmetry.sizes.items()} | dict(start or {})
    wanted = sorted(symmetry.sizes if labels is None else labels)
    generator, gained = torch.Generator().manual_seed(seed), True
    while gained:
        gained = False
        for number in torch.randperm(len(wanted), generator=generator).tolist():
            label = wanted[number]
            score = _similarity(reference, state, symmetry, order, label)
            best = assign(score)
            gain = _total(score, best) - _total(score, order[label])
            if gain > 1e-10 * float(score.abs().max()):
                order[label], gained = best, True
    return {label: order[label] for label in symmetry.sizes}


def assign(score: Tensor) -> Tensor:
    """The permutation p [n] with the largest Σᵢ score[i, pᵢ]."""
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(score.cpu().numpy(), maximize=True)[1])


def check_same(reference: State, state: State, symmetry: Symmetry) -> None:
    """Raise InputError for networks of different names or shapes."""
    for name in symmetry.axes:
        for owner in (reference, state):
            if name not in owner:
                raise InputError(f"{name} is missing in one of the networks: both must have the same architecture")
        if reference[name].shape != state[name].shape:
            raise InputError(f"{name} has shapes {list(reference[name].shape)} and {list(state[name].shape)}")


def _similarity(reference: State, state: State, symmetry: Symmetry, order: Permutations, label: str) -> Tensor:
    """Inner products [n, n] of the reference's units and the state's, whose other axes are permuted as they are now."""
    size = symmetry.sizes[label]
    score = torch.zeros(size, size, dtype=torch.float64)
    for name, number in symmetry.places(label):
        axes = symmetry.axes[name]
        other = permute(state[name], axes, symmetry, order, leave=number)
        sides = [_units(tensor, number, axes[number], size) for tensor in (reference[name], other)]
        score += (sides[0] @ sides[1].mT).cpu()
    return score


def _units(tensor: Tensor, number: int, axis: Axis | None, size: int) -> Tensor:
    """[n, rest] in float64: one row for each unit along an axis."""
    repeat = axis.repeat if axis else 1
    return tensor.double().unflatten(number, (repeat, size, -1)).movedim(number + 1, 0).flatten(1)


def _total(score: Tensor, order: Tensor) -> float:
    return float(score[torch.arange(len(order)), order].sum())
