"""What adaptation minimises."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from adamerge import objectives


class Objective(nn.Module, ABC):
    """A loss per image. `needs` declares the information it takes beyond the images; a run says so when it starts."""

    #: Any of "labels", "teacher", "task id", "train data".
    needs: ClassVar[frozenset[str]] = frozenset({"task id"})

    @abstractmethod
    def forward(self, logits: Tensor) -> Tensor:
        """[B, C] logits of one task -> [B] losses."""


class Entropy(Objective):
    """Entropy of the predictions, H(p) = −Σ_c p_c log p_c (AdaMerging, arXiv:2310.02575, eq. 5).

    Args:
        eps: added inside the logarithm; 1e-8 reproduces published runs, 0 is exact.
    """

    def __init__(self, eps: float = 0.0) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, logits: Tensor) -> Tensor:
        return objectives.entropy(logits, self.eps)
