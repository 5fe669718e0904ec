"""Scales that grow with depth."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from adamerge.errors import InputError
from adamerge.kinds import block_of
from adamerge.rules.base import Changes, Correction, Stack


class Lines(Correction[Mapping[str, float]]):
    """Layer-increasing scaling (LiNeS, arXiv:2410.17146): the merged change of block l = 0 … L−1 times α + β l/(L−1).

    Shallow blocks, which hold what all tasks share, stay near the base. What is outside any block has the factor α,
    embeddings and head alike, and so has a block that is alone in its stack. Blocks are found in the tensors' names;
    every stack of them (a vision and a text tower) has its own depth, and the numbered stages of a ResNet
    (`layer1.0` … `layer4.2`) are one stack.

    The scale of a merge multiplies all of it: at scale 1, α + β is the factor of the deepest block.

    Args:
        alpha: α; by default ‖Σₖ τₖ‖₁ / (K ‖τ‖₁) over all parameters for the merged change τ, which is 1/K for
            `TaskArithmetic`. For a single expert, the paper takes 1 − β.
        beta: β, which the paper chooses by validation.
    """

    elementwise = True

    def __init__(self, alpha: float | None = None, beta: float = 0.5) -> None:
        if not (0 <= beta < float("inf") and (alpha is None or 0 <= alpha < float("inf"))):
            raise InputError(f"expected alpha >= 0 and beta >= 0 in Lines, got {alpha} and {beta}")
        self.alpha, self.beta = alpha, beta

    def fit(self, changes: Changes) -> Mapping[str, float]:
        """The factor of every tensor."""
        alpha = shallow_scale(changes) if self.alpha is None else self.alpha
        return {name: alpha + self.beta * depth for name, depth in relative_depths(changes.names).items()}

    def correct(self, stack: Stack, change: Tensor, statistics: Mapping[str, float]) -> Tensor:
        return statistics[stack.name] * change


def shallow_scale(changes: Changes) -> float:
    """‖Σₖ τₖ‖₁ / (K ‖τ‖₁), and 1/K for a merge that changes nothing."""
    summed = merged = 0.0
    for stack, change in changes:
        summed += float(stack.deltas.sum(0).abs().double().sum())
        merged += float(change.abs().double().sum())
    return (summed / merged if merged else 1.0) / len(changes.tasks)


def relative_depths(names: Iterable[str]) -> dict[str, float]:
    """l / (L − 1) of the block that each tensor is in, 0 outside any."""
    blocks = block_of(names)
    stacks: dict[str, dict[tuple[int, int], str]] = {}
    for block in set(blocks.values()):
        *modules, index = block.split(".")
        if index.isdigit():
            stage = ".".join(modules)
            stack = stage.rstrip("0123456789")
            stacks.setdefault(stack, {})[int(stage[len(stack) :] or 0), int(index)] = block
    depths = {}
    for places in stacks.values():
        for depth, place in enumerate(sorted(places)):
            depths[places[place]] = depth / max(len(places) - 1, 1)
    return {name: depths.get(block, 0.0) for name, block in blocks.items()}
