"""Interpolation and means on a sphere: along arcs for the directions of tensors, apart from that for their lengths.

Two vectors that are parallel, opposite or zero span no arc, and a single number has a sign but no direction: for both,
a line takes the arc's place. Tensors are in float32 or better.
"""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from adamerge.differences import PIECE
from adamerge.errors import InputError
from adamerge.rules.weights import weighted_sum

#: What the vectors of a tensor are: all of it, W[i] for each i, or W[:, j] for each j.
Grain: TypeAlias = Literal["tensor", "row", "column"]

#: Above this |cos|, `slerp` takes two vectors for parallel.
PARALLEL = 0.9995

#: Sines and lengths of sums of unit vectors below this are rounding errors.
_ROUNDING = 1e-6

#: A shorter vector has no direction.
_ZERO = 1e-30


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a (t = 0) to b (t = 1) along an arc, both seen as one vector each (Shoemake, 1985).

    (sin((1 − t)Ω) a + sin(tΩ) b) / sin Ω with Ω = arccos(⟨a, b⟩ / |a||b|). Where |cos Ω| > 0.9995, or a or b is zero,
    (1 − t) a + t b. Lengths count for nothing but the angle, as in mergekit.
    """
    norms = float(a.norm()) * float(b.norm())
    cosine = float((a * b).sum()) / norms if norms > _ZERO else 1.0
    if abs(cosine) > PARALLEL:
        return torch.lerp(a, b, t)
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def nuslerp(a: Tensor, b: Tensor, t: float, per: Grain = "tensor") -> Tensor:
    """`slerp` for the whole tensor, each row or each column, up to where two vectors are parallel to rounding.

    Tensors of more than two axes are seen as [shape[0], rest], those of fewer as one vector. mergekit's `nuslerp` takes
    rows where flattening is off, and what is a column here where it is told `row_wise`.
    """
    left, right = (_matrix(x, per) for x in (a, b))
    axis = 0 if per == "column" and a.dim() > 1 else 1
    norms = [torch.linalg.vector_norm(x, dim=axis, keepdim=True) for x in (left, right)]
    units = [x / norm.clamp(min=_ZERO) for x, norm in zip((left, right), norms, strict=True)]
    # Unlike arccos, exact for small angles and for nearly opposite vectors.
    apart = torch.linalg.vector_norm(units[0] - units[1], dim=axis, keepdim=True)
    angle = 2 * torch.atan2(apart, torch.linalg.vector_norm(units[0] + units[1], dim=axis, keepdim=True))
    sine = torch.sin(angle)
    line = (sine < _ROUNDING) | (norms[0] <= _ZERO) | (norms[1] <= _ZERO)
    first = torch.where(line, 1 - t, torch.sin((1 - t) * angle) / sine)
    second = torch.where(line, t, torch.sin(t * angle) / sine)
    return (first * left + second * right).view(a.shape)


def multislerp(tensors: Tensor, weights: list[float], name: str = "a tensor") -> Tensor:
    """The weighted mean direction of [K, *shape], at the weighted mean length: u · Σ wₖ|θₖ|, u ∝ Σ wₖ θₖ/|θₖ|.

    mergekit's `multislerp` goes on from u along the mean of the tangents at u; that mean is zero, by what u is.

    Raises:
        InputError: where the directions cancel out; it calls the tensor `name`.
    """
    if tensors[0].numel() == 1:
        return weighted_sum(tensors, weights)
    norms = [float(tensor.norm()) for tensor in tensors]
    if max(norms) <= _ZERO:
        return torch.zeros_like(tensors[0])
    direction = _direction(tensors, weights, norms, name)
    return direction * sum(weight * norm for weight, norm in zip(weights, norms, strict=True))


def karcher(tensors: Tensor, max_iter: int = 10, tol: float = 1e-5, name: str = "a tensor") -> Tensor:
    """The direction nearest to those of [K, *shape] along arcs (the Karcher mean), at the mean length (1/K) Σ |θₖ|.

    From the normalised mean of the directions uₖ, steps m ← exp_m(mean of log_m(uₖ)), `max_iter` at most, until a step
    is shorter than `tol`. Tensors no longer than `tol` have no say in the direction, unless all are that short.

    Raises:
        InputError: where the directions cancel out; it calls the tensor `name`.
    """
    # All that is ever formed are weighted sums of the uₖ, whose products with each other say all there is to know.
    products = _products(tensors)
    norms = products.diagonal().sqrt()
    there = norms > (tol if norms.max() > tol else _ZERO)
    if not there.any() or tensors[0].numel() == 1:
        return tensors.mean(0)
    units = products[there][:, there] / torch.outer(norms[there], norms[there])
    mean = torch.full_like(norms[there], 1 / int(there.sum()))
    length = math.sqrt(max(float(mean @ units @ mean), 0))
    if length <= _ROUNDING:
        raise _no_direction(name)
    mean = mean / length
    for _ in range(max_iter):
        cosines = units @ mean
        away = torch.eye(len(mean)).to(mean) - torch.outer(cosines, mean)
        sines = torch.linalg.vecdot(away, away @ units).clamp(min=0).sqrt()
        arcs = torch.where(sines > _ROUNDING, torch.atan2(sines, cosines) / sines, 0)
        tangent = arcs @ away / len(mean)
        step = math.sqrt(max(float(tangent @ units @ tangent), 0))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
    weights = torch.zeros_like(norms).index_put_((there,), mean / norms[there] * norms.mean())
    return weighted_sum(tensors, weights.tolist())


def _products(tensors: Tensor) -> Tensor:
    """⟨θⱼ, θₖ⟩ of [K, *shape], [K, K] in float64."""
    flat = tensors.reshape(len(tensors), -1)
    return sum((part @ part.T for part in map(Tensor.double, flat.split(PIECE, 1))), flat.new_zeros(()).double())


def _matrix(tensor: Tensor, per: Grain) -> Tensor:
    return tensor.reshape(1, -1) if per == "tensor" or tensor.dim() < 2 else tensor.flatten(1)


def _direction(tensors: Tensor, weights: list[float], norms: list[float], name: str) -> Tensor:
    """Σ wₖ θₖ/|θₖ|, normalised; zeros have no part in it."""
    scaled = [w / norm if norm > _ZERO else 0.0 for w, norm in zip(weights, norms, strict=True)]
    mean = weighted_sum(tensors, scaled)
    length = float(mean.norm())
    if length <= _ROUNDING * sum(map(abs, weights)):
        raise _no_direction(name)
    return mean / length


def _no_direction(name: str) -> InputError:
    return InputError(
        f"{name}: the experts' directions cancel out, and there is no mean direction; give other weights, leave an "
        "expert out, or take a rule that adds, such as Linear"
    )
