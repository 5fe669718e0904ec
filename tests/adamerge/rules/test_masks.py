"""One model per task from one shared vector: masks and scales as counted by hand."""

import pytest
import torch
from by_hand import vectors
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.deltas import dense
from adamerge.packed import Packed
from adamerge.rules import Emr, TallMask, TaskArithmetic, Trim, transform
from adamerge.rules.masks import tall_mask

# -- TALL masks --------------------------------------------------------------------------------------------------------


def test_an_entry_is_its_experts_where_it_outweighs_the_others():
    deltas = torch.tensor([[4.0, 1.0, 0.0, -3.0], [1.0, -10.0, 0.0, -3.0], [0.0, 0.0, 0.0, -3.0]])
    masks = tall_mask(deltas, deltas.sum(0), 0.4)
    # Beside the others, that is: 4 of 1, 1 of 4, 0 of 5; 1 of 10, 10 of 1, 0 of 9; nothing at all; 3 of 6 each.
    assert masks.int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert torch.equal(masks[1], tall_mask(deltas[1], deltas.sum(0), 0.4))


def test_the_bound_itself_is_not_above_it():
    deltas = torch.tensor([[1.0], [2.0]])
    assert tall_mask(deltas, deltas.sum(0), 0.5).tolist() == [[False], [True]]


def test_a_threshold_of_zero_keeps_what_the_expert_changed():
    deltas = torch.tensor([[1.0, 0.0, -1e-9], [5.0, 7.0, 2.0]])
    assert torch.equal(tall_mask(deltas, deltas.sum(0), 0.0), deltas != 0)


def test_every_entry_may_have_its_own_threshold():
    delta, merged = torch.tensor([1.0, 1.0, -1.0]), torch.tensor([2.0, 3.0, -4.0])
    # |τ − τₖ| is 1, 2, 3.
    assert tall_mask(delta, merged, torch.tensor([1.0, 0.1, 0.3])).tolist() == [False, True, True]


def test_every_task_takes_its_part_of_the_sum():
    after = TallMask(0.5)(vectors(w=[[4.0, 1.0, -1.0], [1.0, 4.0, 2.0]], b=[[1.0], [3.0]]))
    # Sums are (5, 5, 1) and 4; an entry stays where |τₖ| > |Στ − τₖ| / 2.
    assert dense(after.deltas["w"]).tolist() == [[5, 0, 0], [0, 5, 1]]
    assert dense(after.deltas["b"]).tolist() == [[0], [4]]
    assert isinstance(after.deltas["w"], Packed)


def test_every_task_may_have_its_own_threshold():
    tv = vectors(w=[[4.0, 1.0], [3.0, 4.0]])
    assert dense(TallMask({"b": 0.2, "a": 2.0})(tv).deltas["w"]).tolist() == [[0, 0], [7, 5]]
    with pytest.raises(InputError, match=r"thresholds for \['a', 'c'\], the experts are \['a', 'b'\]$"):
        TallMask({"a": 0.4, "c": 0.4})(tv)


def test_one_expert_is_itself(base, experts):
    tv = TaskVectors.from_state_dicts(base, {"digits": experts["digits"]})
    for rule in (TallMask(0.6), Emr()):
        expert = transform(tv, [rule]).expert("digits")
        assert all(torch.equal(expert[name], value) for name, value in experts["digits"].items())


@pytest.mark.parametrize("threshold", [0.0, -1.0, {"a": 0.4, "b": 0.0}])
def test_a_threshold_is_positive(threshold):
    with pytest.raises(InputError, match="expected a threshold above 0 in TallMask"):
        TallMask(threshold)


# -- EMR ---------------------------------------------------------------------------------------------------------------


def test_the_largest_of_the_elected_sign_is_shared_and_rescaled():
    after = Emr()(vectors(w=[[1.0, -2.0, 3.0, 0.0], [3.0, 1.0, -4.0, 0.0]], b=[[2.0], [2.0]]))
    # Sums (4, −1, −1, 0), 4: τ_u = (3, −2, −4, 0), 2. Task a keeps (3, −2) and 2, task b (3, −4) and 2.
    means = [6 / 4 + 2, 8 / 4 + 2]
    kept = [5 / 4 + 2, 7 / 4 + 2]
    a, b = means[0] / kept[0], means[1] / kept[1]
    assert_close(dense(after.deltas["w"]).tolist(), [[3 * a, -2 * a, 0.0, 0.0], [3 * b, 0.0, -4 * b, 0.0]])
    assert_close(dense(after.deltas["b"]).tolist(), [[2 * a], [2 * b]])


def test_emr_is_what_loops_over_numbers_say(tv):
    after, scales = Emr()(tv), []
    unified: dict[str, list[float]] = {}
    for name, deltas in tv.deltas.items():
        columns = deltas.reshape(3, -1).T.tolist()
        signs = [1 if sum(column) > 0 else -1 for column in columns]
        unified[name] = [
            s * max([abs(x) for x in c if x * s > 0] or [0.0]) for s, c in zip(signs, columns, strict=True)
        ]
    for k in range(3):
        own = kept = 0.0
        for name, deltas in tv.deltas.items():
            numbers = deltas[k].flatten().tolist()
            own += sum(map(abs, numbers)) / len(numbers)
            kept += sum(abs(u) for u, x in zip(unified[name], numbers, strict=True) if u * x > 0) / len(numbers)
        scales.append(own / kept)
        for name, deltas in tv.deltas.items():
            numbers = deltas[k].flatten().tolist()
            expected = [scales[k] * u if u * x > 0 else 0.0 for u, x in zip(unified[name], numbers, strict=True)]
            assert_close(dense(after.deltas[name])[k].flatten().tolist(), expected)
    assert len(set(scales)) == 3


def test_identical_experts_are_themselves(base, experts):
    tv = TaskVectors.from_state_dicts(base, dict.fromkeys("abc", experts["digits"]))
    expert = transform(tv, [Emr()]).expert("b")
    assert all(torch.equal(expert[name], value) for name, value in experts["digits"].items())


def test_where_experts_cancel_the_negative_one_wins():
    after = Emr()(vectors(w=[[2.0, -1.0], [-2.0, 1.0]]))
    assert dense(after.deltas["w"]).tolist() == [[0, -1.5 / 0.5], [-1.5 / 1.0 * 2, 0]]


def test_an_expert_that_is_always_outvoted_is_the_base():
    after = Emr()(vectors(w=[[1.0, -1.0], [-3.0, 2.0]], b=[[0.5], [-1.0]]))
    assert dense(after.deltas["w"])[0].tolist() == [0, 0]
    assert dense(after.deltas["w"])[1].tolist() == [-3, 2]


@pytest.mark.filterwarnings("ignore:.*identical to the base")
@pytest.mark.parametrize("rule", [TallMask(), Emr()], ids=lambda rule: type(rule).__name__)
def test_an_expert_that_is_the_base_stays_so(rule):
    after = rule(vectors(w=[[0.0, 0.0], [1.0, -2.0]], b=[[0.0], [0.0]]))
    assert dense(after.deltas["w"]).tolist() == [[0, 0], [1, -2]]
    assert rule(vectors(w=[[0.0], [0.0]])).rows == ()


@pytest.mark.parametrize("rule", [TallMask(), Emr()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(base, experts, rule, dtype):
    states = {task: {n: v.to(dtype) for n, v in state.items()} for task, state in {"base": base, **experts}.items()}
    tv = TaskVectors.from_state_dicts(states.pop("base"), states)
    after = rule(tv)
    assert {delta.dtype for delta in after.deltas.values()} == {torch.float32}
    assert {value.dtype for value in after.expert("digits").values()} == {dtype}


@pytest.mark.parametrize("rule", [TallMask(), Emr()], ids=lambda rule: type(rule).__name__)
def test_the_order_of_experts_does_not_matter(base, experts, rule):
    there = rule(TaskVectors.from_state_dicts(base, experts))
    back = rule(TaskVectors.from_state_dicts(base, dict(reversed(experts.items()))))
    for task in experts:
        for name, value in there.expert(task).items():
            assert_close(back.expert(task)[name], value, rtol=0, atol=1e-14)


def test_they_stand_after_other_transforms_and_before_a_sum(tv):
    after = transform(tv, [Trim(0.4), Emr()])
    merged = merge(tv, [Trim(0.4), Emr(), TaskArithmetic()], scale=0.3)
    for name, value in tv.base.items():
        assert_close(merged[name], value + 0.3 * dense(after.deltas[name]).sum(0), rtol=0, atol=1e-14)


def test_scalars_have_masks_too():
    tv = TaskVectors.from_state_dicts(
        {"scale": torch.tensor(1.0)}, {"a": {"scale": torch.tensor(2.0)}, "b": {"scale": torch.tensor(1.25)}}
    )
    masked: Tensor = dense(TallMask()(tv).deltas["scale"])
    assert masked.tolist() == [1.25, 0.0]
    assert dense(Emr()(tv).deltas["scale"]).tolist() == [1.0, 0.25]
