"""Continual merging: an expert joins a merge, without the experts that are in it already."""

from collections.abc import Mapping

from torch import Tensor

from adamerge.errors import InputError
from adamerge.kinds import kind
from adamerge.rules.base import Folds, Rule, Stack
from adamerge.rules.combining import combined
from adamerge.rules.linear import Mean
from adamerge.rules.weights import check_count
from adamerge.task_vectors import TaskVectors


class Fold(Rule[None]):
    """One step of a continual merge: of two "experts", the first is the merge so far and the second joins it.

    `merge(TaskVectors.open(base, {"so far": merged, "new": expert}), [Fold(Mean(), count=3)])` is what four experts
    merged at once would be, up to the rounding of the merge so far to its dtype: keep it in float32 where many are to
    follow. Running statistics are averaged over all experts.

    Args:
        rule: what the merge so far was made with: `Mean`, `TaskArithmetic` or another that can be folded (`Folds`).
        count: how many experts are in the merge so far.
        scale: the scale that the merge so far was made with. That of this merge stays 1.
    """

    keeps_statistics = True

    def __init__(self, rule: Rule, count: int, scale: float = 1.0) -> None:  # type: ignore[type-arg]
        if not isinstance(rule, Folds):
            can = ", ".join(sorted(each.__name__ for each in Folds.__subclasses__()))
            raise InputError(f"{type(rule).__name__} needs all experts at once; rules that can be folded are {can}")
        if count < 1:
            raise InputError(f"expected count to be the number of experts in the merge so far, 1 or more, got {count}")
        self.rule, self.count, self.scale = rule, count, scale
        self.elementwise = rule.elementwise

    def check(self, tasks: tuple[str, ...]) -> None:
        check_count(2, tasks, "Fold")

    def combine(self, stack: Stack, statistics: None) -> Tensor:
        so_far, new = stack.deltas
        if kind(stack.name, stack.base) == "statistics":
            return Mean().add(so_far, new, self.count, stack.name)
        return self.rule.add(so_far, self.scale * new, self.count, stack.name)


def fold(
    merged: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    rule: Rule,  # type: ignore[type-arg]
    count: int,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Let an expert join a merge of `count` others, which are no longer needed; see `Fold`. All are state dicts.

    Raises:
        InputError: for a rule that cannot be folded, and for states that do not fit together.
    """
    two = TaskVectors.from_state_dicts(base, {"the merge so far": merged, "the new expert": expert})
    return combined(two, Fold(rule, count, scale), 1.0)
