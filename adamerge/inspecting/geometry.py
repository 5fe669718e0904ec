"""How task vectors lie to each other: inner products, norms and signs by block, in one pass over all tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.checkpoints import meta
from adamerge.deltas import dense
from adamerge.differences import pieces
from adamerge.kinds import block_of, kind
from adamerge.ops import matrix
from adamerge.task_vectors import TaskVectors
from adamerge.threads import WORKERS, in_order


@dataclass(frozen=True)
class Geometry:
    """Sums over the entries of each of B blocks that some expert changed, in float64; ratios of them are properties.

    Attributes:
        tasks: the K experts.
        blocks: B names (`adamerge.kinds.block_of`), in the base's order.
        entries: of each block, [B].
        base: Σ θ₀², [B].
        gram: Σ τᵢ τⱼ, [B, K, K].
        sums: Σ τₖ, [B, K].
        mass: Σ |τₖ|, [B, K].
        against_mass: that of the entries whose sign is not that of Σₖ τₖ, [B, K]: what electing signs takes away.
        changed: entries with τₖ ≠ 0, [B, K].
        against: those of them whose sign is the minority's, [B, K]; half of them where the experts are divided evenly.
        signs: Σ sgn τᵢ sgn τⱼ, entries of equal sign less those of opposite signs, [B, K, K].
        squares: Σ τᵢ² τⱼ², [B, K, K].
    """

    tasks: tuple[str, ...]
    blocks: tuple[str, ...]
    entries: Tensor
    base: Tensor
    gram: Tensor
    sums: Tensor
    mass: Tensor
    against_mass: Tensor
    changed: Tensor
    against: Tensor
    signs: Tensor
    squares: Tensor

    @property
    def cosines(self) -> Tensor:
        """cos(τᵢ, τⱼ) by block, [B, K, K]; 0 for an expert that did not change a block."""
        return correlations(self.gram)

    @property
    def noise(self) -> Tensor:
        """The cosines' standard deviation by block, were signs tossed for every entry: a few entries decide little."""
        norms = self.norms
        return ratio(self.squares.sqrt(), norms.unsqueeze(-1) * norms.unsqueeze(-2))

    @property
    def cosine(self) -> Tensor:
        """cos(τᵢ, τⱼ) over all blocks, [K, K]."""
        return correlations(self.gram.sum(0))

    @property
    def kinship(self) -> Tensor:
        """Pearson's correlation of τᵢ and τⱼ over all entries, [K, K]: model kinship (arXiv:2410.12613)."""
        sums = self.sums.sum(0)
        return correlations(self.gram.sum(0) - torch.outer(sums, sums) / self.entries.sum())

    @property
    def agreement(self) -> Tensor:
        """Cosine of the signs over all blocks, [K, K]: 1 where experts move the same entries the same way."""
        return correlations(self.signs.sum(0))

    @property
    def distance(self) -> Tensor:
        """‖τᵢ − τⱼ‖ over all entries, [K, K]."""
        gram = self.gram.sum(0)
        squares = gram.diagonal()
        return (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * gram).clamp(min=0).sqrt()

    @property
    def norms(self) -> Tensor:
        """‖τₖ‖ by block, [B, K]."""
        return self.gram.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def norm(self) -> Tensor:
        """‖τₖ‖ over all blocks, [K]."""
        return self.gram.sum(0).diagonal().sqrt()

    @property
    def relative(self) -> Tensor:
        """‖τₖ‖ / ‖θ₀‖ over all blocks, [K]."""
        return ratio(self.norm, self.base.sum().sqrt())

    @property
    def reach(self) -> Tensor:
        """⟨Σⱼ τⱼ, τₖ⟩ / ‖τₖ‖², [K]: how far the sum goes along each expert. 1 is as far as the expert itself went."""
        gram = self.gram.sum(0)
        return ratio(gram.sum(1), gram.diagonal())

    @property
    def chance(self) -> float:
        """The share of entries in the minority where each of K signs is a coin's: E[min(n, K − n)] / K."""
        count = len(self.tasks)
        return sum(math.comb(count, n) * min(n, count - n) for n in range(count + 1)) / (count * 2**count)

    @property
    def opposition(self) -> float:
        """The share of movement against the sum where K unrelated experts change alike, normally: (1 − 1/√K) / 2.

        Half of |x| where the sign of a sum is not that of its part x, which correlates with it by 1/√K.
        """
        return (1 - len(self.tasks) ** -0.5) / 2


def correlations(gram: Tensor) -> Tensor:
    """Gᵢⱼ / √(Gᵢᵢ Gⱼⱼ) of [..., K, K]; 0 where an expert has no length."""
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return ratio(gram, norms.unsqueeze(-1) * norms.unsqueeze(-2)).clamp(-1, 1)


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """A quotient that is 0 where there is nothing to divide by."""
    return torch.where(whole > 0, part / torch.where(whole > 0, whole, 1), 0)


@torch.no_grad()
def measure(task_vectors: TaskVectors, advance: Callable[[int], None] = lambda entries: None) -> Geometry:
    """Read all parameters once, large ones in pieces; `advance` is told how many entries have been read."""
    likes = {name: meta(task_vectors.base, name) for name in task_vectors.deltas}
    names = [name for name, like in likes.items() if kind(name, like) == "parameter"]
    parts = ((n, rows) for n in names for rows in (pieces(likes[n].shape) if task_vectors.elementwise else (None,)))
    place, totals = block_of(names), dict[str, list[Tensor]]()

    def read(part: tuple[str, slice | None]) -> tuple[str, list[Tensor]]:
        base, deltas = task_vectors.piece(*part)
        return place[part[0]], tally(base, matrix(dense(deltas)))

    # Tensors that are computed whole are computed one at a time.
    workers = WORKERS if task_vectors.elementwise else 1
    for block, found in in_order(read, parts, workers):
        kept = totals.setdefault(block, found)
        if kept is not found:
            totals[block] = [one + other for one, other in zip(kept, found, strict=True)]
        advance(int(found[0]))
    changed = {block: sums for block, sums in totals.items() if bool(sums[2].any())}
    stacked = [torch.stack(sums) for sums in zip(*changed.values(), strict=True)] or _nothing(len(task_vectors.tasks))
    return Geometry(task_vectors.tasks, tuple(changed), *stacked)


def tally(base: Tensor, deltas: Tensor) -> list[Tensor]:
    """What `Geometry` sums up, of some entries: base of any shape, deltas [K, n]."""
    base, deltas = base.double().cpu(), deltas.double().cpu()
    signs, sizes = deltas.sign(), deltas.abs()
    mass, changed = sizes.sum(1), signs.abs().sum(1)
    against_mass = (mass - deltas @ deltas.sum(0).sign()) / 2
    against = (changed - signs @ signs.sum(0).sign()) / 2
    entries = torch.tensor(float(base.numel()), dtype=torch.float64)
    sums = [deltas.sum(1), mass, against_mass, changed, against, signs @ signs.mT]
    squares = sizes.square_()
    return [entries, base.square().sum(), deltas @ deltas.mT, *sums, squares @ squares.mT]


def _nothing(tasks: int) -> list[Tensor]:
    shapes = [(), (), (tasks, tasks), *[(tasks,)] * 5, *[(tasks, tasks)] * 2]
    return [torch.zeros(0, *shape, dtype=torch.float64) for shape in shapes]
