"""Experts as signs: sizes and thresholds as counted by hand, and in how little memory."""

import math
import statistics

import pytest
import torch
from by_hand import vectors
from torch.testing import assert_close

from adamerge import InputError, TaskVectors
from adamerge import differences as module
from adamerge.deltas import dense
from adamerge.packed import Packed
from adamerge.rules import ComPeft, OneBit, Trim, transform
from adamerge.rules.signs import deviations

# -- one bit -----------------------------------------------------------------------------------------------------------


def test_signs_of_the_mean_size():
    after = OneBit()(vectors(w=[[1.0, -2.0, 3.0, -6.0], [-1.0, -1.0, 1.0, 1.0]], b=[[5.0], [-7.0]]))
    assert dense(after.deltas["w"]).tolist() == [[3, -3, 3, -3], [-1, -1, 1, 1]]
    assert dense(after.deltas["b"]).tolist() == [[5], [-7]]
    assert after.deltas["w"].masks is None


def test_what_did_not_move_stays():
    after = OneBit()(vectors(w=[[0.0, -2.0, 4.0], [0.0, 0.0, 9.0]], b=[[1.0, -1.0], [0.0, 0.0]]))
    assert dense(after.deltas["w"]).tolist() == [[0, -2, 2], [0, 0, 3]]
    assert dense(after.deltas["b"]).tolist() == [[1, -1], [0, 0]]
    assert after.deltas["b"].masks is None, "an expert that left a tensor alone needs no mask"


def test_a_bit_for_each_element():
    tv = TaskVectors.from_state_dicts({"w": torch.zeros(80, 50)}, {t: {"w": torch.randn(80, 50)} for t in "ab"})
    assert OneBit()(tv).deltas["w"].nbytes == 2 * (80 * 50 // 8 + 4)


# -- ternary -----------------------------------------------------------------------------------------------------------


def test_the_largest_entries_of_the_whole_vector_get_its_deviation():
    w, b = [[1.0, -9.0, 2.0, 3.0], [0.0, 1.0, 2.0, 8.0]], [[-4.0, 5.0], [7.0, -6.0]]
    after = ComPeft(0.34, scale=2.0)(vectors(w=w, b=b))
    sizes = [2 * statistics.pstdev(x + y) for x, y in zip(w, b, strict=True)]
    signs = {"w": [[0, -1, 0, 0], [0, 0, 0, 1]], "b": [[-1, 1], [1, -1]]}
    for name, rows in signs.items():
        expected = [[sign * size for sign in row] for row, size in zip(rows, sizes, strict=True)]
        assert_close(dense(after.deltas[name]).tolist(), expected)


def test_entries_are_those_that_trim_keeps(tv):
    after, trimmed = ComPeft(0.3)(tv), Trim(0.3)(tv)
    for name in tv.deltas:
        assert torch.equal(dense(after.deltas[name]).sign(), trimmed.deltas[name].sign())


def test_tensors_that_no_expert_changed_do_not_count():
    own = ComPeft(1.0)(vectors(w=[[1.0, -3.0]])).deltas["w"]
    assert_close(dense(own).tolist(), [[2.0, -2.0]])
    more = ComPeft(1.0)(vectors(w=[[1.0, -3.0]], frozen=[[0.0] * 9])).deltas["w"]
    assert torch.equal(dense(own), dense(more))


def test_zeros_are_never_kept():
    after = ComPeft(1.0)(vectors(w=[[0.0, 2.0, -2.0, 0.0]]))
    assert_close(dense(after.deltas["w"]).tolist(), [[0.0, math.sqrt(2), -math.sqrt(2), 0.0]])


def test_pieces_of_a_large_tensor_count_once(monkeypatch, tv):
    whole = deviations(tv)
    monkeypatch.setattr(module, "PIECE", 7)
    assert_close(deviations(tv), whole, rtol=1e-14, atol=0)


def test_pieces_leave_the_same_signs(monkeypatch, tv):
    whole = ComPeft(0.3)(tv)
    monkeypatch.setattr(module, "PIECE", 7)
    for name, delta in ComPeft(0.3)(tv).deltas.items():
        assert torch.equal(dense(delta).sign(), dense(whole.deltas[name]).sign())


@pytest.mark.filterwarnings("ignore:.*identical to the base")
@pytest.mark.parametrize("rule", [OneBit(), ComPeft()], ids=lambda rule: type(rule).__name__)
def test_an_expert_that_is_the_base_stays_so(rule):
    after = rule(vectors(w=[[0.0, 0.0, 0.0], [1.0, -2.0, 0.0]]))
    assert dense(after.deltas["w"])[0].tolist() == [0, 0, 0]
    assert rule(vectors(w=[[0.0], [0.0]])).rows == ()


@pytest.mark.parametrize("rule", [OneBit(), ComPeft(1.0)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(base, experts, rule, dtype):
    states = {task: {n: v.to(dtype) for n, v in state.items()} for task, state in {"base": base, **experts}.items()}
    after = transform(TaskVectors.from_state_dicts(states.pop("base"), states), [rule])
    assert all(isinstance(delta, Packed) and delta.dtype == torch.float32 for delta in after.deltas.values())
    assert {value.dtype for value in after.expert("digits").values()} == {dtype}


@pytest.mark.parametrize(("arguments", "message"), [((0.0,), "0 < keep <= 1"), ((0.2, 0.0), "a scale above 0")])
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(InputError, match=f"expected {message} in ComPeft, got 0.0"):
        ComPeft(*arguments)


def test_one_entry_alone_has_no_deviation():
    assert dense(ComPeft(1.0)(vectors(w=[[3.0]])).deltas["w"]).tolist() == [[0.0]]
    assert dense(OneBit()(vectors(w=[[3.0]])).deltas["w"]).tolist() == [[3.0]]
