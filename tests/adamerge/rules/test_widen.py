"""Importance of columns, number by number."""

import math

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Widen
from adamerge.rules.widen import disentangled, importance


def scores(moved: list[list[float]], above: float, score: float) -> list[list[float]]:
    ranks = [[sum(other < x for other in row) for x in row] for row in moved]
    size = len(moved[0])
    return [
        [
            score
            if rank > above * sum(row) / size
            else math.exp(rank / size) / sum(math.exp(other[j] / size) for other in ranks)
            for j, rank in enumerate(row)
        ]
        for row in ranks
    ]


def by_hand(base: list[list[float]], deltas: list[list[list[float]]], above: float, score: float) -> list[list[float]]:
    """The equations for lists [out][in] and [K][out][in]."""
    rows, columns = range(len(base)), range(len(base[0]))
    size, turn = [], []
    for delta in deltas:
        size.append([])
        turn.append([])
        for j in columns:
            before = [base[i][j] for i in rows]
            after = [base[i][j] + delta[i][j] for i in rows]
            norms = math.hypot(*before), math.hypot(*after)
            size[-1].append(abs(norms[1] - norms[0]))
            turn[-1].append(1 - sum(x * y for x, y in zip(before, after, strict=True)) / (norms[0] * norms[1]))
    weights = scores(size, above, score), scores(turn, above, score)
    return [
        [sum((weights[0][k][j] + weights[1][k][j]) / 2 * deltas[k][i][j] for k in range(len(deltas))) for j in columns]
        for i in rows
    ]


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize(("above", "score"), [(1.0, 1.0), (0.5, 0.7), (3.0, 1.0)])
def test_the_equations_of_a_matrix(experts, above, score):
    rng = torch.Generator().manual_seed(experts)
    base = torch.randn(4, 9, generator=rng, dtype=torch.float64)
    deltas = 0.3 * torch.randn(experts, 4, 9, generator=rng, dtype=torch.float64)
    expected = torch.tensor(by_hand(base.tolist(), deltas.tolist(), above, score), dtype=torch.float64)
    shapes = {"fc.weight": (4, 9), "conv.weight": (4, 3, 3), "embed_tokens.weight": (9, 4)}

    def shaped(value: torch.Tensor, name: str) -> torch.Tensor:
        return (value.T if "embed" in name else value).reshape(shapes[name])

    start = {name: shaped(base, name).clone() for name in shapes}
    ends = {str(k): {n: shaped(base + deltas[k], n).clone() for n in shapes} for k in range(experts)}
    merged = merge(TaskVectors.from_state_dicts(start, ends), rules=[Widen(above, score)])
    for name in shapes:
        assert_close(merged[name] - start[name], shaped(expected, name), rtol=1e-10, atol=1e-12)


def test_a_vector_goes_by_how_far_its_entries_moved():
    deltas = torch.tensor([[1.0, -3.0, 2.0, 0.5], [0.1, 0.2, -0.3, 0.4]])
    tv = TaskVectors.from_state_dicts({"b": torch.ones(4)}, {str(k): {"b": 1 + row} for k, row in enumerate(deltas)})
    weights = scores(deltas.abs().tolist(), 1.0, 1.0)
    expected = [sum(weights[k][j] * float(deltas[k][j]) for k in range(2)) for j in range(4)]
    assert_close((merge(tv, rules=[Widen()])["b"] - 1).tolist(), expected, rtol=1e-6, atol=1e-6)


def test_equal_columns_are_equally_important():
    moved = torch.tensor([[2.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    found = importance(moved, above=1.0, score=5.0)
    assert found[0].tolist() == [5.0, 0.5, 0.5, 0.5]
    assert found[1, 1:].tolist() == [0.5] * 3


def test_columns_of_zeros_have_a_direction_only_once_they_moved():
    base = torch.tensor([[0.0, 0.0, 0.1], [0.0, 0.0, 0.7]])
    deltas = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
    size, turn = disentangled(base, deltas)
    assert_close(size, torch.tensor([[0.0, 2**0.5, 0.0]]))
    assert turn.tolist() == [[0, 1, 0]]


def test_arguments_are_checked():
    with pytest.raises(InputError, match=r"expected above >= 0 in Widen, got -1"):
        Widen(above=-1.0)
    with pytest.raises(InputError, match=r"embeddings='\(' in Widen is no regular expression"):
        Widen(embeddings="(")
