"""Rules over the low-rank factors of experts: LoRA adapters, Δₖ = Bₖ Aₖ."""

import numpy as np
import torch
from torch import Tensor

from adamerge.checkpoints import Factors
from adamerge.errors import InputError
from adamerge.linalg import leading
from adamerge.rules.base import Stack
from adamerge.rules.magnitudes import kth
from adamerge.rules.matrices import TWO_AXES, Matrices, MatrixRule, batches, rounding


def factors(stack: Stack) -> Factors:
    """B [K, m, r] and A [K, r, n] in float64: those of adapters, which share the factor α/r, or else those of an SVD.

    A dense Δ = U S Vᵀ is U √S and √S Vᵀ at its numerical rank, with the sign of each direction by which the largest
    entry of its row of A is positive. Experts of a lower rank than others have zeros beyond it.
    """
    if stack.factors is not None:
        return stack.factors.left.double(), stack.factors.right.double()
    rank, least = min(stack.deltas.shape[1:]), rounding(stack)
    found = zip(*(leading(delta, rank, stack.name, least) for delta in batches(stack.deltas)), strict=True)
    left, values, right = (torch.cat(parts) for parts in found)
    used = values.any(0)
    left, values, right = left[..., used], values[:, used].sqrt(), right[:, used]
    sign = torch.gather(right, 2, right.abs().argmax(2, keepdim=True)).sign()
    return left * (values.unsqueeze(1) * sign.mT), values.unsqueeze(2) * sign * right


def thinned(factor: Tensor, keep: float) -> Tensor:
    """One factor with the `keep` share of its entries that are not zero, those of the largest magnitude."""
    sizes = factor.abs()
    present = sizes[sizes > 0]
    if not len(present):
        return factor
    drop = len(present) - max(1, round(keep * len(present)))
    return torch.where(sizes >= kth(present, drop + 1), factor, 0)


def copa(left: Tensor, right: Tensor, keep: float, weight: float) -> Tensor:
    """See `CoPa`: [K, m, r] and [K, r, n] -> [m, n]."""
    b, a = (torch.stack([thinned(factor, keep) for factor in part]) for part in (left, right))
    before, after = right.abs().sum(2), a.abs().sum(2)
    scales = torch.where(after > 0, before / torch.where(after > 0, after, 1), 0)
    for scale, there in zip(scales, before > 0, strict=True):
        if bool(there.any()):
            values = scale[there].sort().values
            scale[there] = scale[there].clamp(min=values[int(len(values) * (1 - keep))])
    total = scales.sum(0)
    shares = scales / torch.where(total > 0, total, 1)
    return weight**2 * (b * shares.unsqueeze(1)).sum(0) @ a.sum(0)


class CoPa(MatrixRule):
    """RobustMerge (CoPA-Merging, arXiv:2502.17159): factors pruned, and rebalanced rank by rank.

    Of every factor the `keep` share of largest entries stays. What row i of Aₖ has lost,

        sₖᵢ = Σⱼ |Aₖᵢⱼ| / Σⱼ |pruned Aₖᵢⱼ|,

    makes up for it in column i of Bₖ, normalised over the experts: the merge is B A with A = w Σₖ Aₖ and
    column i of B = w Σₖ sₖᵢ Bₖᵢ / Σₖ sₖᵢ. As in the paper's code, all but the `keep` share of largest sₖᵢ of an expert
    are raised to the least of these, and w = 2. A row of which nothing is left has sₖᵢ = 0 before that. Whatever is no
    matrix is averaged.

    Made for LoRA adapters that began from the same A; deltas that are dense are factorised (see `factors`). Where a
    layer keeps its weight as [in, out], A and B change places.

    Args:
        keep: 0 < keep ≤ 1.
        weight: w > 0, of both factors.
        matrices: which tensors are matrices.
    """

    def __init__(self, keep: float = 0.2, weight: float = 2.0, matrices: Matrices = TWO_AXES) -> None:
        super().__init__(matrices)
        if not 0 < keep <= 1 or weight <= 0:
            raise InputError(f"expected 0 < keep <= 1 and weight > 0 in CoPa, got {keep} and {weight}")
        self.keep, self.weight = keep, weight

    def matrix(self, stack: Stack) -> Tensor:
        return copa(*factors(stack), self.keep, self.weight)


def lego(left: Tensor, right: Tensor, clusters: int | None, seed: int) -> Tensor:
    """See `LoraLego`: [K, m, r] and [K, r, n] -> [m, n]."""
    from sklearn.cluster import KMeans  # slow to import

    rows, rank = left.shape[1:]
    units = torch.cat([left.mT, right], 2).flatten(0, 1).cpu().numpy()
    # Sorted, so that the order of the experts does not matter to where the search begins.
    units, counts = np.unique(units[units.any(1)], axis=0, return_counts=True)
    clusters = min(clusters or rank, len(units))
    if clusters == len(units):
        labels = np.arange(clusters)
    else:
        labels = KMeans(clusters, random_state=seed).fit(units, sample_weight=counts).labels_
    merged = []
    for label in range(clusters):
        members, weights = units[labels == label], counts[labels == label]
        centre = np.average(members, axis=0, weights=weights)
        norm = np.average(np.linalg.norm(members, axis=1), weights=weights)
        merged.append(centre * (norm / (np.linalg.norm(centre) or 1)))
    centres = torch.from_numpy(np.stack(merged)).to(left)
    return (rank / clusters) ** 0.5 * centres[:, :rows].mT @ centres[:, rows:]


class LoraLego(MatrixRule):
    """LoRA-LEGO (arXiv:2409.16167): the ranks of all adapters, clustered.

    Column i of Bₖ and row i of Aₖ, side by side, are a unit: Bₖ Aₖ is the sum over its units, in any order. The units
    of all experts are clustered by k-means, and the centre of each cluster is a unit of the merge. Two factors restore
    the scale: a centre is made as long as the units of its cluster are on average, since directions that differ cancel;
    and the merge is multiplied by √(r/k), r being the experts' rank, since variance grows with the number k of units.
    Whatever is no matrix is averaged.

    From the paper are the units, the clustering and the two causes of a wrong scale; lengths as Euclidean norms of both
    parts together, with √(α/r) in each of them, and the search (one k-means++ start, over sorted units) are choices
    made here. Identical experts give that expert. Deltas that are dense are factorised (see `factors`).

    Args:
        rank: k ≥ 1, of the merge; that of the experts by default. No more than there are units.
        seed: of the clustering.
        matrices: which tensors are matrices.
    """

    def __init__(self, rank: int | None = None, seed: int = 0, matrices: Matrices = TWO_AXES) -> None:
        super().__init__(matrices)
        if rank is not None and rank < 1:
            raise InputError(f"expected a rank of at least 1 in LoraLego, got {rank}")
        self.rank, self.seed = rank, seed

    def matrix(self, stack: Stack) -> Tensor:
        return lego(*factors(stack), self.rank, self.seed)
