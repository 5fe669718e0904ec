"""Rules over singular values."""

import re

from adamerge.deltas import AnyDeltas, LowRank, dense
from adamerge.errors import InputError
from adamerge.rules.base import PerTensor


class TruncatedSVD(PerTensor[None]):
    """Each matrix of τₖ at its best approximation of rank r, as in Twin-Merging (arXiv:2406.15479).

    τₖ = U S Vᵀ ≈ U_r S_r V_rᵀ, kept as two factors (`LowRank`) where these take less memory, else dense. Tensors of
    more than two axes are seen as [shape[0], rest]. Those of one axis stay as they are, and so do matrices that are no
    larger than r.

    Args:
        rank: r itself, or as a float the fraction of min(m, n), 0 < rank ≤ 1, rounded down but 1 at least.
        exclude: regular expression; tensors in whose names it is found stay as they are.
    """

    def __init__(self, rank: int | float, exclude: str | None = None) -> None:
        if not (0 < rank <= 1 if isinstance(rank, float) else rank >= 1):
            raise InputError(f"expected a whole rank from 1 on, or a fraction above 0 and up to 1.0, got {rank}")
        try:
            re.compile(exclude or "")
        except re.error as error:
            raise InputError(f"exclude={exclude!r} in TruncatedSVD is no regular expression: {error}") from error
        self.rank, self.exclude = rank, exclude

    def tensor(self, name: str, deltas: AnyDeltas, statistics: None) -> AnyDeltas:
        if len(deltas.shape) < 3 or (self.exclude is not None and re.search(self.exclude, name)):
            return deltas
        rows, columns = deltas.shape[1], deltas.shape[2:].numel()
        most = min(rows, columns)
        # The small number keeps 0.29 · 100 at 29.
        rank = max(1, int(self.rank * most + 1e-9)) if isinstance(self.rank, float) else self.rank
        if rank >= most:
            return deltas
        factors = LowRank.from_dense(dense(deltas), rank, name)
        return factors if rank * (rows + columns) < rows * columns else factors.dense()
