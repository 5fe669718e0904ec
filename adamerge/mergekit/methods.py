"""The merge methods of a mergekit file: what each takes, and the weights that it gives.

Numbers are those of mergekit, whose users expect them: rescaling keeps the L1 norm of a tensor, TIES trims tensor by
tensor, `della` normalises. Where a result differs by design, `Method.notes` says so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from adamerge.deltas import dense
from adamerge.mergekit import differences, masks
from adamerge.rules.base import Stack, WeightRule, each_expert, entrywise
from adamerge.rules.random import generator
from adamerge.rules.sce import Sce
from adamerge.rules.sphere import Grain, karcher, multislerp, nuslerp, slerp
from adamerge.rules.stock import model_stock


@dataclass(frozen=True)
class Resolved:
    """The parameters of one output tensor as numbers; those that are true or false are 1 or 0.

    Attributes:
        models: the K' ≤ K models that take part in this tensor, in the order of the stack's first axis.
        shared: by name, for the merge of the tensor.
        own: by name, for each of the models.
        based: whether the stack's base is the base model of the file; if not, it is the first of the models.
        seed: of random masks.
    """

    models: tuple[str, ...]
    shared: Mapping[str, float]
    own: tuple[Mapping[str, float], ...]
    based: bool = True
    seed: int = 0

    def column(self, parameter: str, stack: Stack) -> Tensor:
        """One parameter of all models, [K', 1, ..., 1]."""
        values = stack.deltas.new_tensor([own[parameter] for own in self.own])
        return values.view(-1, *[1] * stack.base.dim())


Combine = Callable[[Stack, Resolved], Tensor]
Mask = Callable[[Tensor, Mapping[str, float], torch.Generator], Tensor]


@dataclass(frozen=True)
class Method:
    """One merge method.

    Attributes:
        combine: a stack and the parameters of its tensor to the merged weights, [*shape].
        shared: parameters of the merge with their defaults; None where one must be given.
        own: parameters of each model, likewise.
        base: whether the file must name a base model, may, or the method has no use for one.
        models: the least and the greatest number of models besides the base.
        elects: whether entries elect a sign.
        elementwise: as in `adamerge.rules.Rule`.
        notes: where the result differs from mergekit's.
    """

    combine: Combine
    shared: Mapping[str, float | None] = field(default_factory=dict)
    own: Mapping[str, float | None] = field(default_factory=dict)
    base: Literal["needed", "possible", "unused"] = "needed"
    models: tuple[int, float] = (0, math.inf)
    elects: bool = False
    elementwise: bool = False
    notes: tuple[str, ...] = ()


class Mergekit(WeightRule[None]):
    """Merges every tensor by one of mergekit's methods, with parameters of its own.

    Args:
        method: a name out of `METHODS`.
        parameters: of every floating tensor, by its name.
    """

    def __init__(self, method: str, parameters: Mapping[str, Resolved]) -> None:
        self.method, self.parameters = METHODS[method], parameters
        self.elementwise = self.method.elementwise

    def weights(self, stack: Stack, statistics: None) -> Tensor:
        resolved = self.parameters[stack.name]
        if not resolved.models:
            return stack.base
        part = Stack(stack.name, stack.base, stack.deltas[: len(resolved.models)], resolved.models)
        return self.method.combine(part, resolved)


# -- weighted sums of task vectors -------------------------------------------------------------------------------------


def combined(deltas: Tensor, weight: Tensor, elect: bool, normalize: bool) -> Tensor:
    """Σₖ wₖτₖ, over the models whose wₖτₖ has the sign of the sum where signs are elected; divided by their weights.

    A sum of zero elects +. Elected entries are divided by Σ|wₖ|: dividing by Σwₖ would undo the sign of entries that
    models with negative weights alone have kept.

    Args:
        deltas: [K, *shape].
        weight: [K, 1, ..., 1].
        elect: whether signs are elected, as in TIES (arXiv:2306.01708).
        normalize: whether to divide.
    """
    weighted = deltas * weight
    total, share = weighted.sum(0), weight.sum(0)
    if elect:
        sign = torch.where(total >= 0, 1.0, -1.0).to(total)
        agreed = weighted.mul_(sign).relu_()  # the magnitudes of what has that sign
        total = agreed.sum(0).mul_(sign)
        share = agreed.sign_().mul_(weight.abs()).sum(0) if normalize else share
    return total / torch.where(share.abs() < 1e-8, 1, share) if normalize else total


def _task_vectors(
    mask: Mask | None = None,
    elect: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    notes: Sequence[str] = (),
    **own: float,
) -> Method:
    """Weighted sums of task vectors, of which a mask may keep a part."""

    def combine(stack: Stack, resolved: Resolved) -> Tensor:
        def masked(k: int, delta: Tensor) -> Tensor:
            own = resolved.own[k]
            if mask is None or own["density"] >= 1:
                return delta
            kept = mask(delta, own, generator(resolved.seed, resolved.models[k], stack.name))
            return masks.rescaled(delta, kept) if resolved.shared["rescale"] else delta * kept

        deltas = stack.deltas if mask is None else dense(each_expert(stack.deltas, masked))
        weight, normalize = resolved.column("weight", stack).view(-1, 1), bool(resolved.shared["normalize"])
        change = entrywise(lambda part: combined(part, weight, elect, normalize), deltas)
        return stack.base + resolved.shared["lambda"] * change

    shared = {"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False}
    per_model = {"weight": None, **({"density": 1.0} if mask is not None else {}), **own}
    return Method(combine, shared, per_model, elects=elect, elementwise=mask is None, notes=tuple(notes))


# -- the other methods -------------------------------------------------------------------------------------------------


def _linear(stack: Stack, resolved: Resolved) -> Tensor:
    weight = resolved.column("weight", stack)
    if resolved.shared["normalize"]:
        return stack.base + (weight / weight.sum(0) * stack.deltas).sum(0)
    return (weight * stack.experts).sum(0)


def _passthrough(stack: Stack, resolved: Resolved) -> Tensor:
    return resolved.own[0]["scale"] * stack.experts[0]


def _slerp(stack: Stack, resolved: Resolved) -> Tensor:
    return slerp(stack.base, stack.experts[0], resolved.shared["t"])


def _nuslerp(stack: Stack, resolved: Resolved) -> Tensor:
    first, second = (own["weight"] for own in resolved.own)
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    # mergekit's `row_wise` turns the vectors that lie along the first axis: columns.
    vectors: Grain = "column" if resolved.shared["nuslerp_row_wise"] else "row"
    per: Grain = "tensor" if resolved.shared["nuslerp_flatten"] else vectors
    if resolved.based:
        return stack.base + nuslerp(stack.deltas[0], stack.deltas[1], t, per)
    start, end = stack.experts
    return nuslerp(start, end, t, per)


def _multislerp(stack: Stack, resolved: Resolved) -> Tensor:
    weights = [own["weight"] for own in resolved.own]
    if resolved.shared["normalize_weights"]:
        weights = [weight / sum(weights) for weight in weights]
    if resolved.based:
        return stack.base + multislerp(stack.deltas, weights, stack.name)
    return multislerp(stack.experts, weights, stack.name)


def _karcher(stack: Stack, resolved: Resolved) -> Tensor:
    return karcher(stack.experts, int(resolved.shared["max_iter"]), resolved.shared["tol"], stack.name)


def _model_stock(stack: Stack, resolved: Resolved) -> Tensor:
    return stack.base + model_stock(stack.deltas, "row" if resolved.shared["filter_wise"] else "tensor")


def _sce(stack: Stack, resolved: Resolved) -> Tensor:
    keep = min(resolved.shared["select_topk"], 1.0)
    return stack.base + Sce(keep).combine(stack, None) if keep > 0 else stack.base


METHODS: Mapping[str, Method] = {
    "linear": Method(_linear, {"normalize": True}, {"weight": None}, "unused", (1, math.inf), elementwise=True),
    "task_arithmetic": _task_vectors(),
    "ties": _task_vectors(masks.magnitude, elect=True, normalize=True, notes=[differences.EQUAL]),
    "dare_linear": _task_vectors(masks.random, rescale=True, notes=[differences.KEYED]),
    "dare_ties": _task_vectors(masks.random, elect=True, rescale=True, notes=[differences.KEYED]),
    "della": _task_vectors(
        masks.ranked,
        elect=True,
        normalize=True,
        rescale=True,
        epsilon=0.15,
        notes=[differences.KEYED, differences.COLUMN],
    ),
    "della_linear": _task_vectors(
        masks.ranked, rescale=True, epsilon=0.15, notes=[differences.KEYED, differences.COLUMN]
    ),
    "breadcrumbs": _task_vectors(masks.outliers, gamma=0.01, notes=[differences.EQUAL]),
    "breadcrumbs_ties": _task_vectors(masks.outliers, elect=True, gamma=0.01, notes=[differences.EQUAL]),
    "slerp": Method(_slerp, {"t": None}, models=(1, 1), notes=(differences.ZERO,)),
    "nuslerp": Method(
        _nuslerp,
        {"nuslerp_flatten": True, "nuslerp_row_wise": False},
        {"weight": None},
        "possible",
        (2, 2),
        notes=(differences.ZERO,),
    ),
    "multislerp": Method(
        _multislerp, {"normalize_weights": True, "eps": 1e-8}, {"weight": None}, "possible", (1, math.inf)
    ),
    "model_stock": Method(
        _model_stock,
        {"filter_wise": False},
        models=(2, math.inf),
        notes=(differences.LINE,),
    ),
    "karcher": Method(_karcher, {"max_iter": 10, "tol": 1e-5}, {}, "unused", (1, math.inf)),
    "sce": Method(
        _sce,
        {"select_topk": 1.0},
        notes=(differences.ENERGY, differences.SELECTED),
    ),
    "passthrough": Method(_passthrough, {}, {"scale": 1.0}, "unused", (1, 1), elementwise=True),
}
