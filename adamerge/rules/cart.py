"""Task vectors from the mean of the experts, at a low rank."""

import torch
from torch import Tensor

from adamerge.errors import InputError
from adamerge.linalg import leading
from adamerge.rules.anchor import Rebase
from adamerge.rules.linear import Mean
from adamerge.rules.matrices import LINEAR, Matrices, MatrixTransform, batches
from adamerge.task_vectors import TaskVectors


class Cart(MatrixTransform):
    """Centred and truncated task vectors (CART, arXiv:2412.12153): θ̄ + λ Σₖ SVD_q(Δₖ − Δ̄).

    The mean θ̄ of the experts takes the base's place (`Rebase`), and what each matrix of an expert differs from it by is
    cut to its q largest singular values. Everything that is not cut sums to zero, so that at any scale λ the merge has
    the mean there. λ from 2.3 to 3 is usual for eight tasks. Task vectors over files are loaded.

    Args:
        rank: q as a share of min(m, n), 0 < rank ≤ 1, rounded down but 1 at least; 0.16 for eight tasks, 0.32 for more.
        matrices: which tensors are matrices.
    """

    def __init__(self, rank: float = 0.16, matrices: Matrices = LINEAR) -> None:
        super().__init__(matrices)
        if not 0 < rank <= 1:
            raise InputError(f"expected rank above 0 and up to 1 in Cart, got {rank}")
        self.rank = rank

    def __call__(self, task_vectors: TaskVectors) -> TaskVectors:
        return super().__call__(Rebase(Mean(), 1.0)(task_vectors))

    def matrix(self, deltas: Tensor, name: str) -> Tensor:
        rank = max(1, int(self.rank * min(deltas.shape[1:]) + 1e-9))  # which keeps 0.29 · 100 at 29
        factors = (leading(delta, rank, name) for delta in batches(deltas))
        return torch.cat([(left * values.unsqueeze(-2)) @ right for left, values, right in factors])
