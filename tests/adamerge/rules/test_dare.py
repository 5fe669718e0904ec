"""Random drops: masks as drawn for each tensor, survivors enlarged, chances by rank as counted by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, differences, merge
from adamerge.rules import Dare, Della, ElectSign, Prune, TaskArithmetic, Trim, transform
from adamerge.rules.dare import dare, della_chances
from adamerge.rules.random import generator


def vectors(tasks: str = "abc", size: int = 4000) -> TaskVectors:
    """Experts whose task vectors are theirs whatever the others are, from a zero base."""
    base = {"w": torch.zeros(size // 10, 10), "v": torch.zeros(size)}
    experts = {
        task: {
            name: torch.randn(value.shape, generator=torch.Generator().manual_seed(ord(task)))
            for name, value in base.items()
        }
        for task in tasks
    }
    return TaskVectors.from_state_dicts(base, experts)


# -- DARE --------------------------------------------------------------------------------------------------------------


def test_given_a_mask_survivors_are_enlarged():
    delta, keep = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[True, True], [False, True]])
    assert dare(delta, keep, 0.75).tolist() == [[4, -8], [0, 0]]
    assert dare(delta, keep, 0.0).tolist() == [[1, -2], [0, 0]]


def test_the_mask_is_what_the_generator_draws():
    tv = vectors()
    after = Dare(0.75, seed=5)(tv)
    for name, delta in tv.deltas.items():
        for k, task in enumerate(tv.tasks):
            drawn = torch.rand(delta.shape[1:], generator=generator(5, task, name))
            pairs = zip(delta[k].flatten().tolist(), drawn.flatten().tolist(), strict=True)
            expected = [4 * value if number >= 0.75 else 0.0 for value, number in pairs]
            assert after.deltas[name][k].flatten().tolist() == expected


@pytest.mark.parametrize("step", [Dare(0.6, seed=3), Della(0.5, 0.3, seed=3)], ids=["Dare", "Della"])
def test_masks_depend_on_nothing_but_seed_expert_and_tensor(step):
    after, alone, turned = step(vectors("abc")), step(vectors("b")), step(vectors("cba"))
    fewer = vectors("abc")
    del fewer.deltas["w"]
    for name, deltas in after.deltas.items():
        assert torch.equal(deltas[1], alone.deltas[name][0])
        assert torch.equal(deltas.flip(0), turned.deltas[name])
    assert torch.equal(step(fewer).deltas["v"], after.deltas["v"])
    other = type(step)(step.drop, seed=4)(vectors("abc"))
    assert not torch.equal(other.deltas["v"] != 0, after.deltas["v"] != 0)


def test_the_dtype_does_not_change_a_mask():
    single, double = vectors(), vectors()
    double = TaskVectors(double.base, {n: d.double() for n, d in double.deltas.items()}, double.tasks)
    for step in (Dare(0.9), Della(0.5, 0.2)):
        before, after = step(single), step(double)
        assert all(torch.equal(before.deltas[n] != 0, after.deltas[n] != 0) for n in single.deltas)


def test_as_many_are_dropped_as_chance_has_it():
    for step, drop in ((Dare(0.9), 0.9), (Dare(0.3), 0.3), (Della(0.3, 0.4), 0.3)):
        share = (step(vectors()).deltas["v"] == 0).double().mean().item()
        assert abs(share - drop) < 5 * (drop * (1 - drop) / 12000) ** 0.5


def test_nothing_to_drop_changes_nothing():
    tv = vectors()
    for step in (Dare(0.0), Della(0.0, 0.0), Dare(0.9, only="nothing")):
        assert all(torch.equal(step(tv).deltas[name], delta) for name, delta in tv.deltas.items())


def test_without_rescaling_survivors_keep_their_size():
    tv = vectors()
    for step in (Dare(0.5, rescale=False), Della(0.5, 0.2, rescale=False)):
        for name, after in step(tv).deltas.items():
            kept = after != 0
            assert torch.equal(after[kept], tv.deltas[name][kept])
            assert not kept.all()


def test_only_some_tensors_are_masked():
    tv = vectors()
    after = Dare(0.5, only=r"^w$")(tv)
    assert torch.equal(after.deltas["v"], tv.deltas["v"])
    assert not after.deltas["w"].all()


@pytest.mark.parametrize("drop", [-0.1, 1.0, 90])
def test_a_share_to_drop_is_wanted(drop):
    with pytest.raises(InputError, match=f"expected 0 <= drop < 1 in Dare, got {drop}"):
        Dare(drop)


# -- DELLA -------------------------------------------------------------------------------------------------------------


def test_the_larger_in_its_row_the_likelier():
    delta = torch.tensor([[0.1, -4.0, 2.0], [0.0, 1.0, 9.0]])
    assert_close(
        della_chances(delta, drop=0.5, window=0.4),
        torch.tensor([[0.3, 0.7, 0.5], [0.3, 0.5, 0.7]], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("delta", "chances"),
    [
        (torch.tensor([3.0, -1.0, 2.0]), [0.8, 0.6, 0.7]),
        (torch.tensor(3.0), 0.7),
        (torch.tensor([[3.0], [1.0]]), [[0.7], [0.7]]),
        (torch.tensor([[[1.0, 3.0], [2.0, -4.0]]]), [[[0.6, 0.6 + 0.4 / 3], [0.6 + 0.2 / 3, 0.8]]]),
    ],
    ids=["vector", "scalar", "column", "convolution"],
)
def test_what_a_row_is(delta, chances):
    assert_close(della_chances(delta, drop=0.3, window=0.2), torch.tensor(chances, dtype=torch.float64))


def test_survivors_are_divided_by_their_chance():
    tv = vectors()
    after = Della(0.4, 0.3, seed=2)(tv)
    for name, deltas in after.deltas.items():
        for before, delta, task in zip(tv.deltas[name], deltas, tv.tasks, strict=True):
            chances = della_chances(before, 0.4, 0.3)
            drawn = torch.rand(before.shape, generator=generator(2, task, name))
            assert torch.equal(delta != 0, drawn < chances)
            kept = delta != 0
            assert_close(delta[kept].double(), before[kept].double() / chances[kept], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("drop", "window"), [(0.05, 0.14), (0.95, 0.14), (0.5, -0.1), (0.5, 1.2), (1.0, 0.0)])
def test_chances_are_wanted(drop, window):
    with pytest.raises(InputError, match=f"expected chances to be dropped between 0 and 1 in Della, got {drop}"):
        Della(drop, window)


# -- in a list of rules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [Dare(0.9), Della()], ids=["Dare", "Della"])
@pytest.mark.parametrize("after", [Trim(0.2), Prune(0.2), Dare(0.5), Della()], ids=lambda step: type(step).__name__)
def test_nothing_is_dropped_after_a_random_drop(draw, after):
    drawn, name = type(draw).__name__, type(after).__name__
    with pytest.raises(
        InputError, match=f"^{name} after {drawn}, which has left few entries.*leave out one of the two"
    ):
        merge(vectors(), rules=[draw, after])


@pytest.mark.parametrize("draw", [Dare(0.9), Della()], ids=["Dare", "Della"])
def test_nothing_is_drawn_after_an_election(draw):
    name = type(draw).__name__
    with pytest.raises(InputError, match=f"{name} after ElectSign drops entries that have voted: put {name} before"):
        merge(vectors(), rules=[ElectSign(), draw, TaskArithmetic()])


def test_dare_ties_is_a_drop_and_an_election():
    tv = vectors()
    merged = merge(tv, rules=[Dare(0.5), ElectSign("mean")], scale=0.5)
    split = transform(tv, [Dare(0.5)])
    assert all(torch.equal(value, merged[name]) for name, value in merge(split, [ElectSign("mean")], 0.5).items())


def test_the_expected_merge_is_that_of_task_arithmetic():
    base = {"w": torch.zeros(20, 20)}
    tv = TaskVectors.from_state_dicts(base, {"a": {"w": nn.init.eye_(torch.empty(20, 20)) + 1}})
    for make in (lambda seed: Dare(0.5, seed), lambda seed: Della(0.4, 0.3, seed)):
        mean = sum(merge(tv, rules=[make(seed)])["w"] for seed in range(300)) / 300
        assert_close(mean.mean(), tv.deltas["w"].mean(), rtol=0.02, atol=0)


def test_equal_entries_rank_by_position_in_either_precision():
    delta = torch.randn(40, 600).bfloat16().float()  # many equal magnitudes
    delta[3] = 0
    assert torch.equal(della_chances(delta, 0.5, 0.4), della_chances(delta.double(), 0.5, 0.4))


def test_a_large_tensor_is_masked_as_in_one_piece(monkeypatch):
    tv = TaskVectors.from_state_dicts({"w": torch.zeros(60, 50)}, {"a": {"w": torch.randn(60, 50)}})
    whole = transform(tv, [Della()]).deltas["w"]
    monkeypatch.setattr(differences, "PIECE", 128)
    assert torch.equal(transform(tv, [Della()]).deltas["w"], whole)
