"""Orthogonal projections: entry by entry in the basis of the merge so far, at once and one after the other."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, fold, merge
from adamerge.rules import Matrices, Opcm, TaskArithmetic

SHAPES = {"w": (6, 9), "tall": (9, 6), "conv": (4, 3, 2), "bias": (5,)}


@pytest.fixture
def tv() -> TaskVectors:
    base = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    experts = {t: {name: value + torch.randn_like(value) for name, value in base.items()} for t in "abc"}
    return TaskVectors.from_state_dicts(base, experts)


def by_entries(deltas: Tensor, alpha: float) -> Tensor:
    """The sum of cleaned deltas, in full bases."""
    change = deltas[0]
    for delta in deltas[1:]:
        u, s, v = torch.linalg.svd(change, full_matrices=True)
        rotated = u.T @ delta @ v.T
        lead = sum(float(s[: i + 1].sum() / s.sum()) <= alpha for i in range(len(s)))
        for i in range(rotated.shape[0]):
            for j in range(rotated.shape[1]):
                if i == j or (i < lead and j < lead):
                    rotated[i, j] = 0
        change = change + u @ rotated @ v
    return change


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_what_is_in_the_merge_is_left_out_of_the_next(tv, alpha):
    merged = merge(tv, [Opcm(alpha, rescale=False)])
    for name, deltas in tv.deltas.items():
        expected = by_entries(deltas, alpha) if deltas.dim() == 3 else deltas.sum(0)
        assert_close(merged[name] - tv.base[name], expected, rtol=0, atol=1e-11)


def test_the_merge_is_as_long_as_an_expert(tv):
    plain, merged = merge(tv, [Opcm(rescale=False)]), merge(tv, [Opcm()])

    def flat(state):
        return torch.cat([(state[name] - tv.base[name]).flatten() for name in SHAPES])

    lengths = torch.stack([flat(tv.expert(task)).norm() for task in tv.tasks])
    assert_close(flat(merged).norm(), lengths.mean())
    assert_close(flat(merged), flat(plain) * flat(merged).norm() / flat(plain).norm(), rtol=0, atol=1e-12)


def test_rescaling_after_every_expert_is_rescaling_at_the_end(tv):
    """The recursion of the paper: τ ← (λ τ + cleaned) / λ', λ' being its length over the mean one of those so far."""

    def length(state):
        return sum(float(value.square().sum()) for value in state.values()) ** 0.5

    so_far, factor = {name: deltas[0] for name, deltas in tv.deltas.items()}, 1.0
    lengths = [length(so_far)]
    for k in (1, 2):
        joined = {}
        for name, deltas in tv.deltas.items():
            pair = torch.stack([so_far[name], deltas[k]])
            clean = by_entries(pair, 0.5) - so_far[name] if deltas.dim() == 3 else deltas[k]
            joined[name] = factor * so_far[name] + clean
        lengths.append(length({name: deltas[k] for name, deltas in tv.deltas.items()}))
        factor = length(joined) / (sum(lengths) / len(lengths))
        so_far = {name: value / factor for name, value in joined.items()}
    merged = merge(tv, [Opcm()])
    for name, value in so_far.items():
        assert_close(merged[name] - tv.base[name], value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_experts_join_one_after_the_other(tv, scale):
    rule, states = Opcm(rescale=False, matrices=Matrices(convolutions=True)), [tv.expert(task) for task in tv.tasks]
    first = TaskVectors.from_state_dicts(tv.base, {"a": states[0]})
    so_far = merge(first, [rule], scale)
    for count, state in enumerate(states[1:], 1):
        so_far = fold(so_far, tv.base, state, rule, count, scale)
    for name, value in merge(tv, [rule], scale).items():
        assert_close(so_far[name], value, rtol=0, atol=1e-11)


def test_a_fold_sees_whole_matrices(tv, monkeypatch):
    rule, first, second = Opcm(rescale=False), tv.expert("a"), tv.expert("b")
    whole = fold(first, tv.base, second, rule, 1)
    monkeypatch.setattr("adamerge.differences.PIECE", 10)
    assert all(torch.equal(value, whole[name]) for name, value in fold(first, tv.base, second, rule, 1).items())
    sums = fold(first, tv.base, second, TaskArithmetic(), 1)
    assert not torch.allclose(sums["w"], whole["w"], atol=1e-3)


def test_what_is_refused(tv):
    with pytest.raises(InputError, match="Opcm rescales all tensors at once: let experts join with"):
        fold(tv.expert("a"), tv.base, tv.expert("b"), Opcm(), 1)
    with pytest.raises(InputError, match=r"expected alpha from 0 to 1 in Opcm, got 1\.2"):
        Opcm(1.2)
