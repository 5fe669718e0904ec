"""Two experts, each for a part of the weights: by how close they are, or by the block."""

from collections import defaultdict

from torch import Tensor

from adamerge.errors import InputError
from adamerge.kinds import block_of
from adamerge.rules.base import Rule, Stack
from adamerge.rules.weights import check_count
from adamerge.task_vectors import TaskVectors


class NearSwap(Rule[None]):
    """The first expert, moved towards the second by at most t in each entry (NearSwap, as in mergekit).

    θ = θ₁ + w (θ₂ − θ₁) with w = min(t / |θ₂ − θ₁|, 1): where the two are closer than t, the second's value.

    Args:
        t: above 0, in units of weights; 0.0001 made the model that the rule is known from.
    """

    elementwise = True

    def __init__(self, t: float) -> None:
        if not t > 0:
            raise InputError(f"expected t > 0 in NearSwap, got {t}")
        self.t = t

    def check(self, tasks: tuple[str, ...]) -> None:
        check_count(2, tasks, "NearSwap")

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        first, second = stack.deltas
        return first + (second - first).clamp(-self.t, self.t)


class LayerSwap(Rule[dict[str, float]]):
    """The middle blocks of one expert between the outer blocks of another (Layer Swapping, arXiv:2410.01335).

    Of a stack of L blocks, `bottom` first and `top` last ones are the outer expert's, the others the inner one's. At
    each seam, `transition` blocks on the inner side are the mean of both. What is outside any stack, embeddings and
    heads above all, is the outer expert's. The paper has a language's expert outside and one of mathematics inside.

    Blocks are found by their numbers (`adamerge.kinds.block_of`). A model with several stacks, of vision and of text,
    is cut in each of them; shorter stacks than bottom + top + 1 count as outside.

    Args:
        outer: name of the expert of the outer blocks.
        inner: name of the expert of the inner blocks.
        bottom: number of first blocks.
        top: number of last blocks.
        transition: number of averaged blocks at each seam.

    Raises:
        InputError: for other experts than these two, and for a model without a stack of that many blocks.
    """

    elementwise = True
    passes = 0

    def __init__(self, outer: str, inner: str, bottom: int = 5, top: int = 2, transition: int = 1) -> None:
        for argument, value in {"bottom": bottom, "top": top, "transition": transition}.items():
            if value < 0:
                raise InputError(f"expected {argument} >= 0 in LayerSwap, got {value}")
        self.outer, self.inner = outer, inner
        self.bottom, self.top, self.transition = bottom, top, transition

    def check(self, tasks: tuple[str, ...]) -> None:
        check_count(2, tasks, "LayerSwap")
        if sorted(tasks) != sorted((self.outer, self.inner)):
            raise InputError(f"LayerSwap is for {self.outer!r} and {self.inner!r}, the experts are {list(tasks)}")

    def fit(self, task_vectors: TaskVectors) -> dict[str, float]:
        """The inner expert's share of each tensor: 1, 0.5 or 0."""
        blocks = block_of(task_vectors.deltas)
        stacks: dict[str, set[int]] = defaultdict(set)
        for block in blocks.values():
            stack, _, index = block.rpartition(".")
            if index.isdigit():
                stacks[stack].add(int(index))
        inner: dict[str, float] = {}
        for stack, numbers in stacks.items():
            if len(numbers) > self.bottom + self.top:
                for place, number in enumerate(sorted(numbers)):
                    inner[f"{stack}.{number}" if stack else str(number)] = self._share(place, len(numbers))
        if not inner:
            longest = max(map(len, stacks.values()), default=0)
            raise InputError(
                f"LayerSwap has {self.bottom} + {self.top} outer blocks, and the longest stack of the model has only "
                f"{longest}: lower bottom or top"
            )
        return {name: inner.get(block, 0.0) for name, block in blocks.items()}

    def _share(self, place: int, count: int) -> float:
        """The inner expert's share of the block at that place of a stack."""
        from_bottom, from_top = place - self.bottom, count - 1 - self.top - place
        if min(from_bottom, from_top) < 0:
            return 0.0
        seams = [distance for distance, outer in ((from_bottom, self.bottom), (from_top, self.top)) if outer]
        return 0.5 if seams and min(seams) < self.transition else 1.0

    def combine(self, stack: Stack, statistics: dict[str, float]) -> Tensor:
        outer, inner = (stack.deltas[stack.tasks.index(task)] for task in (self.outer, self.inner))
        return outer.lerp(inner, statistics[stack.name])
