"""Task vectors of a few numbers, as counted by hand."""

import torch

from adamerge import TaskVectors


def vectors(**deltas: list[list[float]]) -> TaskVectors:
    """Task vectors from a zero base, tensor by tensor."""
    values = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in deltas.items()}
    tasks = "abcdefgh"[: len(next(iter(values.values())))]
    base = {name: torch.zeros_like(rows[0]) for name, rows in values.items()}
    experts = {task: {name: rows[k] for name, rows in values.items()} for k, task in enumerate(tasks)}
    return TaskVectors.from_state_dicts(base, experts)
