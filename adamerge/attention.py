"""The output projections of `nn.MultiheadAttention`, which it applies without calling them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def projecting(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """By the name of `out_proj.weight`, the inputs and outputs [T · B, d] of the last call in the block.

    The fused kernels, which would not show them, are off meanwhile.
    """
    names = {id(m.out_proj.weight): out_proj(name) for name, m in attentions(model).items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    plain, fast = F.linear, torch.backends.mha.get_fastpath_enabled()

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = plain(input, weight, bias)
        if id(weight) in names:
            seen[names[id(weight)]] = input, y
        return y

    F.linear = linear
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield seen
    finally:
        F.linear = plain
        torch.backends.mha.set_fastpath_enabled(fast)


def attentions(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Such modules, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}


def out_proj(name: str) -> str:
    """What the weight of a module's output projection is called."""
    return f"{name}.out_proj.weight".lstrip(".")


def as_queries(rows: Tensor, queries: Tensor, batch_first: bool) -> Tensor:
    """Rows [T · B, d] in the order that they are computed in, as the queries are: [B, T, d], [T, B, d] or [T, d]."""
    if queries.dim() == 2:
        return rows
    if not batch_first:
        return rows.unflatten(0, queries.shape[:2])
    return rows.unflatten(0, (queries.shape[1], queries.shape[0])).transpose(0, 1)
