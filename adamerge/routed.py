"""Linear layers whose weights differ from group to group of a batch: W_g = W₀ + Σₖ w_gk τₖ."""

import os
from collections.abc import Mapping
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from adamerge import ops
from adamerge.compositions import Composition, routed_product
from adamerge.deltas import AnyDeltas, Deltas, LowRank
from adamerge.errors import InputError, did_you_mean

#: What it costs to read or to write one element, in multiply-adds of a large matrix product.
MOVE = 20
#: What it costs to bring one element of a matrix into a product with a batch, however few rows that has.
LOAD = 120


def routed_linear(
    x: Tensor,
    routing: Tensor,
    weight: tuple[Tensor, AnyDeltas | None],
    bias: tuple[Tensor, AnyDeltas | None] | None = None,
    transposed: bool = False,
) -> Tensor:
    """y_g = x_g W_gᵀ + b_g with W_g = W₀ + Σₖ w_gk τₖ: exact, without a loop over groups.

    Whichever way is taken, memory does not grow with the number of groups beyond x and y, and only x and w are saved
    (with factors, what lies between them too). The gradient is that of x and w alone.

    Args:
        x: [G, M, I], the M rows (samples × tokens) of every group.
        routing: w, [G, K].
        weight: W₀ [O, I] and its deltas [K, O, I], or of any shape [K, O, ...] with as many elements; no deltas where
            no expert changed it.
        bias: b₀ [O] and its deltas [K, O].
        transposed: W₀ and its deltas are [I, O] and [K, I, O].

    Returns:
        [G, M, O].
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # as for torch's own layers
        x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        routing = routing.to(weight[0].dtype)
        matrix, deltas = weight
        if deltas is None:
            y = F.linear(x, (matrix.T if transposed else matrix).to(x.dtype))
        else:
            backward = torch.is_grad_enabled() and (x.requires_grad or routing.requires_grad)
            way = composition(costs(len(x), x.shape[1], matrix, deltas, backward))
            y = routed_product(x, routing, matrix, deltas, transposed, way)
        return y if bias is None else y.add_(routed_rows(routing, *bias).to(x.dtype).unsqueeze(1))


def routed_rows(routing: Tensor, bias: Tensor, deltas: AnyDeltas | None) -> Tensor:
    """[G, O] vectors b₀ + Σₖ w_gk τₖ, one per group."""
    return bias.expand(len(routing), -1) if deltas is None else ops.weighted_sum(routing, bias, deltas)


def composition(price: Mapping[Composition, float]) -> Composition:
    """The way that costs least; or that which ADAMERGE_COMPOSITION names in the environment, where it can be taken.

    Raises InputError for another name.
    """
    asked = os.environ.get("ADAMERGE_COMPOSITION", "")
    if asked and asked not in get_args(Composition):
        raise InputError(f"ADAMERGE_COMPOSITION={asked}{did_you_mean(asked, get_args(Composition))}")
    return next((way for way in price if way == asked), min(price, key=price.__getitem__))


def costs(
    groups: int, rows: int, matrix: Tensor, deltas: AnyDeltas, backward: bool = False
) -> dict[Composition, float]:
    """What each way costs that can be taken, in multiply-adds of a large matrix product.

    With P = O·I and n = G·M rows in all, a product takes n P, what it multiplies with `LOAD` an element, and whatever
    is read or written on the way `MOVE`. `materialise` stages K + 1 matrices (read, written, read again) and makes G of
    them; going back, it takes two products and composes for both. `expand` and `factorise` do going back what they do
    going forth. `benchmarks.compositions` holds this against the clock.

    Args:
        groups: G.
        rows: M, of every group.
        matrix: W₀.
        deltas: [K, *shape] in any form; what is compressed is made dense, but to factorise.
        backward: whether a backward pass follows.
    """
    tasks, elements, sides = len(deltas), matrix.numel(), sum(matrix.shape)
    batch, passes, products = groups * rows, 1 + backward, 1 + 2 * backward
    product = batch * elements
    unpacked = MOVE * 2 * tasks * elements if isinstance(deltas, Deltas) else 0
    result: dict[Composition, float] = {}
    if isinstance(deltas, LowRank):
        inner = tasks * deltas.left.shape[-1]
        result["factorise"] = passes * (
            product + batch * inner * (sides + 4 * MOVE) + LOAD * (elements + inner * sides)
        )
        unpacked += inner * elements
    staged = MOVE * 3 * (tasks + 1) * elements + unpacked
    result["materialise"] = passes * staged + products * (product + groups * elements * (tasks + 2 * MOVE))
    result["expand"] = passes * ((tasks + 1) * (product + LOAD * elements + MOVE * batch * sides) + unpacked)
    return result
