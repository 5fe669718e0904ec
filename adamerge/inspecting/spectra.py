"""Spectra of the experts' matrices, and how much of the space that each uses is used by another."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import dense
from adamerge.inspecting.geometry import ratio
from adamerge.kinds import block_of, kind
from adamerge.linalg import leading
from adamerge.rules.matrices import LINEAR
from adamerge.task_vectors import TaskVectors

#: Below this share of the largest, a singular value has less than a millionth of its energy, and its vectors may come
#: from the rounding of weights: such directions count as missing.
FAINT = 1e-3


@dataclass(frozen=True)
class Spectrum:
    """One matrix of all experts, Δₖ = Uₖ Σₖ Vₖᵀ.

    Each is cut to its q = ⌊min(m, n) / K⌋ largest singular values, 1 at least: what TSV-M keeps, so that all experts
    fit side by side.

    Attributes:
        name: of the tensor.
        block: in which it sits.
        shape: m, n.
        rank: q.
        values: σ of each expert in falling order, [K, min(m, n)].
        total: σ of Σₖ Δₖ, [min(m, n)].
        ranks: how many of the q directions each expert has, [K].
        left: ‖Uᵢᵀ Uⱼ‖² / min(qᵢ, qⱼ), [K, K], the mean squared cosine of the angles between the spaces of outputs: 1
            where one holds the other, about max(qᵢ, qⱼ) / m for two at random.
        right: the same for the spaces of inputs, Vᵢ and Vⱼ.
        interference: singular task interference (TSV, arXiv:2412.00081), Σ |(UᵀU − I) Σ (VᵀV − I)| over all entries,
            with U = [U₁ … U_K] and V side by side and Σ the kept values: 0 where no direction is shared.
        chance: the interference of these values in spaces drawn at random.
        seconds: that the decompositions took.
    """

    name: str
    block: str
    shape: tuple[int, int]
    rank: int
    values: Tensor
    total: Tensor
    ranks: Tensor
    left: Tensor
    right: Tensor
    interference: float
    chance: float
    seconds: float

    @property
    def kept(self) -> Tensor:
        """The share of ‖Δₖ‖² that the q largest singular values have, [K]; 0 for an expert that changed nothing."""
        squares = self.values.square()
        return ratio(squares[:, : self.rank].sum(1), squares.sum(1))

    @property
    def relative_interference(self) -> float:
        """Interference divided by that of random spaces, so that matrices can be compared: 1 is chance."""
        return self.interference / self.chance if self.chance > 0 else 0.0

    @property
    def overlap(self) -> Tensor:
        """How far two experts share their spaces beyond chance, [K, K]: 0 is chance, 1 the same spaces."""
        larger = torch.maximum(self.ranks.unsqueeze(0), self.ranks.unsqueeze(1))
        beyond = []
        for found, side in zip((self.left, self.right), self.shape, strict=True):
            chance = larger / side
            beyond.append(ratio(found - chance, 1 - chance))
        return torch.where(self.ranks.unsqueeze(0) * self.ranks.unsqueeze(1) > 0, sum(beyond) / 2, 0)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the sum's singular values as shares, divided by their number: 1 for a flat spectrum."""
        shares = ratio(self.total, self.total.sum())
        return float(torch.special.entr(shares).sum().exp() / len(shares))


@torch.no_grad()
def decompose(name: str, deltas: Tensor, block: str = "") -> Spectrum:
    """The spectrum of one matrix of all experts, deltas [K, m, n]."""
    start = time.perf_counter()
    tasks, rows, columns = deltas.shape
    rank = max(1, min(rows, columns) // tasks)
    factors = [_svd(name, delta, rank) for delta in deltas]
    lefts, values, rights = (list(parts) for parts in zip(*factors, strict=True))
    _, total, _ = leading(deltas.double().sum(0), min(rows, columns), name)
    seconds = time.perf_counter() - start
    kept = [sizes[:rank] for sizes in values]
    there = torch.stack([sizes > FAINT * sizes.max() for sizes in kept])
    random = [_random_bases(there, side) for side in (rows, columns)]
    return Spectrum(
        name=name,
        block=block,
        shape=(rows, columns),
        rank=rank,
        values=torch.stack(values).cpu(),
        total=total.cpu(),
        ranks=there.sum(1).double().cpu(),
        left=_overlaps(lefts, there),
        right=_overlaps(rights, there),
        interference=interference(lefts, kept, rights),
        chance=interference(random[0], kept, random[1]),
        seconds=seconds,
    )


def interference(lefts: Sequence[Tensor], values: Sequence[Tensor], rights: Sequence[Tensor]) -> float:
    """Singular task interference of K experts' Uₖ [m, q], σₖ [q] and Vₖ [n, q]."""
    left, right, scale = torch.cat(list(lefts), 1), torch.cat(list(rights), 1), torch.cat(list(values))
    # An expert's own vectors are orthonormal, or 0 where its matrix has fewer directions: its own part is 0 either way.
    left, right = _between(left.mT @ left, len(lefts)), _between(right.mT @ right, len(rights))
    return float(((left * scale) @ right).abs().sum())


def matrices(task_vectors: TaskVectors) -> list[str]:
    """Weights of linear layers, as far as names and shapes tell: two axes, no table of tokens or positions."""
    likes = {name: meta(task_vectors.base, name) for name in task_vectors.deltas}
    return [
        name
        for name, like in likes.items()
        if LINEAR.match(name, like.shape) and min(like.shape) > 1 and kind(name, like) == "parameter"
    ]


def decompose_all(
    task_vectors: TaskVectors, limit: int, advance: Callable[[str], None] = lambda name: None
) -> list[Spectrum]:
    """Spectra of all matrices that an expert changed, or of `limit` of them at even distances from first to last."""
    names = matrices(task_vectors)
    block = block_of(names)
    spectra = []
    for name in evenly(names, limit):
        deltas = dense(task_vectors.deltas[name])
        if bool(deltas.any()):
            spectra.append(decompose(name, deltas, block[name]))
        advance(name)
    return spectra


def evenly(names: Sequence[str], limit: int) -> list[str]:
    """At most `limit` of some names, the first and the last among them."""
    if limit >= len(names):
        return list(names)
    return [names[round(i * (len(names) - 1) / max(limit - 1, 1))] for i in range(limit)]


def _svd(name: str, delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, q], all singular values and V [n, q] of one matrix; directions that it does not have are 0."""
    left, values, right = leading(delta, min(delta.shape), name)
    there = (values > FAINT * values[0])[:rank]
    return left[:, :rank] * there, values, right[:rank].mT * there


def _overlaps(bases: Sequence[Tensor], there: Tensor) -> Tensor:
    """‖Bᵢᵀ Bⱼ‖² / min(qᵢ, qⱼ) of K bases [side, q], of whose directions only some are `there` [K, q]."""
    stacked, ranks = torch.cat(list(bases), 1), there.sum(1)
    squares = (stacked.mT @ stacked).square().view(*there.shape, *there.shape).sum((1, 3))
    return ratio(squares, torch.minimum(ranks.unsqueeze(0), ranks.unsqueeze(1))).cpu()


def _random_bases(there: Tensor, side: int) -> list[Tensor]:
    """K times q orthonormal vectors, or 0 where they are not `there` [K, q]; the same ones for the same sizes."""
    tasks, rank = there.shape
    drawn = torch.randn(tasks, side, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return list(torch.linalg.qr(drawn.to(there.device)).Q * there.unsqueeze(1))


def _between(gram: Tensor, tasks: int) -> Tensor:
    """A Gram matrix [K q, K q] without the blocks [q, q] on its diagonal."""
    rank = gram.shape[0] // tasks
    blocks = gram.view(tasks, rank, tasks, rank).clone()
    blocks.diagonal(dim1=0, dim2=2).zero_()
    return blocks.view_as(gram)
