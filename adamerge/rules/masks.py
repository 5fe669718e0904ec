"""Which entries of a merge matter to which expert."""

from torch import Tensor


def tall_mask(delta: Tensor, merged: Tensor, threshold: float) -> Tensor:
    """Mₖ = 1[|τₖ| > λ |τ − τₖ|] for the merged task vector τ (TALL masks, arXiv:2405.07813).

    An entry is an expert's own where its delta is large beside what all others add to it. Entries that neither the
    expert nor the merge has changed are nobody's.

    Args:
        delta: τₖ [*shape], or those of all experts [K, *shape].
        merged: τ [*shape], before any scale.
        threshold: λ ≥ 0; the smaller, the more entries.
    """
    return delta.abs() > threshold * (merged - delta).abs()
