"""Model Stock: how far experts can be trusted, by how much they agree."""

from typing import Literal

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.rules.base import Rule, Stack


def model_stock(deltas: Tensor, per: Literal["tensor", "row"] = "tensor") -> Tensor:
    """t · mean(τ) with t = Kc / (1 + (K − 1)c) and c the mean cosine over all pairs of experts, for τ [K, *shape].

    c is clamped to 0 … 1, so that t is too: below zero t has a pole, at c = −1/(K − 1), and its outcomes near that are
    many times the deltas. A zero delta has cosine 0 with the others.
    """
    count = len(deltas)
    rows = deltas.shape[1] if per == "row" and deltas.dim() > 2 else 1
    vectors = deltas.reshape(count, rows, -1)
    mean = vectors.mean(0)
    if count > 1:
        norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        total, units = torch.zeros_like(mean), torch.zeros_like(norms[0])
        for vector, norm in zip(vectors, norms, strict=True):
            total += vector / torch.where(norm > 0, norm, 1)
            units += norm > 0
        # |Σ u|² = Σ |u|² + the cosines of all ordered pairs.
        pairs = total.square().sum(-1, keepdim=True) - units
        cosine = (pairs / (count * (count - 1))).clamp(0, 1)
        mean = count * cosine / (1 + (count - 1) * cosine) * mean
    return mean.view(deltas.shape[1:])


class ModelStock(Rule[None]):
    """Model Stock (arXiv:2403.19522): the more the experts agree, the further from the base towards their mean.

    θ = t · mean(θₖ) + (1 − t) θ₀ with t = Kc / (1 + (K − 1)c) and c the mean cosine of two experts' task vectors, for
    each tensor. Meant for runs on the same task: experts of different tasks are nearly orthogonal, and little is left
    of them. See `model_stock`.

    Args:
        per: one t for a "tensor", or one for each "row" W[i] of it.
    """

    def __init__(self, per: Literal["tensor", "row"] = "tensor") -> None:
        if per not in ("tensor", "row"):
            raise InputError(f"expected per to be 'tensor' or 'row' in ModelStock, got {per!r}")
        self.per = per

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        return model_stock(stack.deltas, self.per)
