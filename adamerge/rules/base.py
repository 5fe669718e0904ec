"""What a merging rule is."""

from abc import ABC, abstractmethod

from torch import Tensor


class Rule(ABC):
    """Combines the K deltas of one tensor into one change of the base. Tensors are never changed in place."""

    @abstractmethod
    def combine(self, name: str, deltas: Tensor, tasks: tuple[str, ...]) -> Tensor:
        """[K, *shape] deltas of tensor `name`, in the order of `tasks` -> [*shape]."""

    def apply(self, name: str, base: Tensor, deltas: Tensor, tasks: tuple[str, ...], scale: float) -> Tensor:
        """The merged tensor: base + scale · combine(deltas)."""
        return base + scale * self.combine(name, deltas, tasks)
