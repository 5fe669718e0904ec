"""Importance by how far weights have moved in magnitude and in direction."""

import re

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.rules.base import Rule, Stack


class Widen(Rule[None]):
    """Weight disentanglement (WIDEN, arXiv:2408.03092): the importance of a column is its rank among all columns.

    A matrix [out, in] has magnitudes mⱼ, the norms of its columns, and directions. Column j of expert k has moved by
    Dᵐ = |mₖⱼ − m₀ⱼ| and Dᵈ = 1 − cos(wₖⱼ, w₀ⱼ). Within the expert, either is replaced by its rank in [0, 1). The score
    is the softmax of the ranks over the experts, but s where a rank is above t times the mean rank of that expert.
    τ = Σₖ ½ (scoreᵐ + scoreᵈ) τₖ, column by column. Embeddings [tokens, dim] have a row per token and are taken
    transposed, tensors of more than two axes as [shape[0], rest], and each entry of a vector by |τₖ| alone.

    Equal columns have one rank, that of the lowest place they share.

    Args:
        above: t ≥ 0.
        score: s, what an important column has: 1 adds it up, as task arithmetic does.
        embeddings: a regular expression for the names of embeddings.
    """

    def __init__(self, above: float = 1.0, score: float = 1.0, embeddings: str = r"embed|wte|wpe|shared\.w") -> None:
        if above < 0:
            raise InputError(f"expected above >= 0 in Widen, got {above}")
        try:
            self.embeddings = re.compile(embeddings)
        except re.error as error:
            raise InputError(f"embeddings={embeddings!r} in Widen is no regular expression: {error}") from error
        self.above, self.score = above, score

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        deltas = stack.deltas
        if stack.base.dim() < 2:
            flat = deltas.reshape(len(deltas), -1)
            return (importance(flat.abs(), self.above, self.score) * flat).sum(0).view(stack.base.shape)
        flipped = stack.base.dim() == 2 and self.embeddings.search(stack.name) is not None
        matrices, base = deltas.flatten(2), stack.base.flatten(1)
        if flipped:
            matrices, base = matrices.mT, base.T
        scores = [importance(moved, self.above, self.score) for moved in disentangled(base, matrices)]
        merged = (sum(scores).unsqueeze(1) / 2 * matrices).sum(0)  # type: ignore[union-attr]
        return (merged.T if flipped else merged).reshape(stack.base.shape)


def disentangled(base: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """How far each column has moved in magnitude and in direction, both [K, in], for [out, in] and [K, out, in]."""
    experts = base + deltas
    before, after = base.norm(dim=0), experts.norm(dim=1)
    cosine = (experts * base).sum(1) / (before * after).clamp(min=torch.finfo(base.dtype).tiny)
    # The cosine of a column that nobody changed is 1 whatever rounding says, and 0 / 0 where it is zero.
    return (after - before).abs(), torch.where(deltas.any(1), 1 - cosine, 0)


def importance(moved: Tensor, above: float, score: float) -> Tensor:
    """Scores [K, n] of n columns of K experts by how far they have moved, [K, n]."""
    # Ranks are compared as whole numbers: whether a rank equals the mean one must not depend on rounding.
    place = torch.searchsorted(moved.sort(-1).values, moved.contiguous()).double()
    ranks = (place / moved.shape[1]).to(moved.dtype)
    return torch.where(place > above * place.mean(1, keepdim=True), score, ranks.softmax(0))
