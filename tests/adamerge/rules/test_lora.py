"""Rules over factors, against loops over numbers, and what factors become of dense deltas."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.deltas import LowRank
from adamerge.rules import CoPa, LoraLego, Mean
from adamerge.rules.base import Stack
from adamerge.rules.lora import factors


def vectors(left: Tensor, right: Tensor) -> TaskVectors:
    """Experts whose deltas are kept as factors, over a base of zeros."""
    base = {"w": torch.zeros(left.shape[1], right.shape[2], dtype=left.dtype)}
    return TaskVectors(base, {"w": LowRank(left, right)}, tuple("abcd"[: len(left)]), fingerprints={})


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def largest(rows: list[list[float]], keep: float) -> list[list[float]]:
    """The share `keep` of largest entries, the others 0."""
    ordered = sorted((abs(x) for row in rows for x in row), reverse=True)
    least = ordered[round(keep * len(ordered)) - 1]
    return [[x if abs(x) >= least else 0.0 for x in row] for row in rows]


def test_copa_entry_by_entry():
    left, right = randn(3, 5, 4), randn(3, 4, 6)
    scales, a, b = [], torch.zeros(4, 6, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    for k in range(3):
        kept = largest(right[k].tolist(), 0.5)
        own = [sum(map(abs, whole)) / sum(map(abs, row)) for whole, row in zip(right[k].tolist(), kept, strict=True)]
        scales.append([max(s, sorted(own)[2]) for s in own])  # of four, the least of the larger half
        a += torch.tensor(kept, dtype=torch.float64)
    for i in range(4):
        total = sum(scales[k][i] for k in range(3))
        for k in range(3):
            kept = largest(left[k].tolist(), 0.5)
            for row in range(5):
                b[row, i] += scales[k][i] / total * kept[row][i]
    merged = merge(vectors(left, right), [CoPa(0.5, 3.0)])["w"]
    assert_close(merged, 9 * b @ a, rtol=0, atol=1e-12)


def test_copa_leaves_out_ranks_that_an_expert_does_not_have():
    left, right = randn(2, 5, 3), randn(2, 3, 6)
    left[1, :, 2:], right[1, 2:] = 0, 0
    merged = merge(vectors(left, right), [CoPa(1.0, 1.0)])["w"]
    b = torch.stack([left[:, :, 0].mean(0), left[:, :, 1].mean(0), left[0, :, 2]], 1)
    assert_close(merged, b @ right.sum(0), rtol=0, atol=1e-12)
    left[1], right[1] = 0, 0
    assert_close(merge(vectors(left, right), [CoPa(1.0, 1.0)])["w"], left[0] @ right[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_lego_joins_what_is_alike(order):
    """Two units of the first expert are near two of the second, in another order and of other lengths."""
    left, right = randn(1, 8, 2), 10 * randn(1, 2, 7)
    b, a = torch.cat([left, 1.1 * left.flip(2)]), torch.cat([right, 1.2 * right.flip(1)])
    expected = torch.zeros(8, 7, dtype=torch.float64)
    for i in range(2):
        units = [[*b[0, :, i].tolist(), *a[0, i].tolist()], [*b[1, :, 1 - i].tolist(), *a[1, 1 - i].tolist()]]
        centre = [sum(pair) / 2 for pair in zip(*units, strict=True)]
        mean = sum(math.hypot(*unit) for unit in units) / 2
        unit = torch.tensor([x * mean / math.hypot(*centre) for x in centre], dtype=torch.float64)
        expected += torch.outer(unit[:8], unit[8:])
    merged = merge(vectors(b[list(order)], a[list(order)]), [LoraLego()])["w"]
    assert_close(merged, expected, rtol=0, atol=1e-10)


def test_lego_with_a_unit_for_each_is_the_sum_scaled_for_its_variance():
    left, right = randn(3, 5, 2), randn(3, 2, 6)
    tv = vectors(left, right)
    whole = merge(tv, [LoraLego(rank=6)])["w"]
    assert_close(whole, (2 / 6) ** 0.5 * (left @ right).sum(0), rtol=0, atol=1e-12)
    assert_close(merge(tv, [LoraLego(rank=99)])["w"], whole, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(merge(tv, [LoraLego(rank=1)])["w"]) == 1


@pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
def test_factors_of_dense_deltas_have_their_rank(shape):
    deltas = randn(2, shape[0], 3) @ randn(2, 3, shape[1])
    left, right = factors(Stack("w", torch.zeros(shape, dtype=torch.float64), deltas, ("a", "b")))
    assert left.shape == (2, shape[0], 3)
    assert right.shape == (2, 3, shape[1])
    assert_close(left @ right, deltas, rtol=0, atol=1e-12)
    assert_close(left.norm(dim=1), right.norm(dim=2), rtol=0, atol=1e-10)
    assert (right.gather(2, right.abs().argmax(2, keepdim=True)) > 0).all()


def test_factors_that_are_kept_are_taken():
    left, right = randn(2, 5, 3), randn(2, 3, 6)
    kept = factors(Stack("w", torch.zeros(5, 6), left @ right, ("a", "b"), LowRank(left, right)))
    assert torch.equal(kept[0], left)
    assert torch.equal(kept[1], right)


def test_what_is_no_matrix_is_averaged():
    experts = {task: {"v": randn(5), "c": randn(2, 3, 4)} for task in "ab"}
    tv = TaskVectors.from_state_dicts({"v": randn(5), "c": randn(2, 3, 4)}, experts)
    for rule in (CoPa(), LoraLego()):
        assert_close(merge(tv, [rule]), merge(tv, [Mean()]), rtol=0, atol=1e-14)


def test_arguments_are_checked():
    for keep, weight in ((0.0, 1.0), (1.5, 1.0), (0.5, 0.0)):
        with pytest.raises(InputError, match=f"in CoPa, got {keep} and {weight}"):
            CoPa(keep, weight)
    with pytest.raises(InputError, match="rank of at least 1 in LoraLego, got 0"):
        LoraLego(rank=0)
