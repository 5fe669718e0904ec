"""A static merge in the experts' place: its sum is the merge, at every scale."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge import differences as module
from adamerge.packed import Packed
from adamerge.rules import Cart, ElectSign, Emr, Mean, Merged, Rebase, TaskArithmetic, Trim

LISTS = {"mean": [Mean()], "TIES": [Trim(0.3), ElectSign()], "disjoint mean": [ElectSign("mean")], "trimmed": [Trim()]}


@pytest.mark.parametrize("rules", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_the_sum_of_the_parts_is_the_merge(tv, rules, scale):
    parts, expected = Merged(rules)(tv), merge(tv, rules, scale)
    for name, value in merge(parts, scale=scale).items():
        assert_close(value, expected[name], rtol=0, atol=1e-14)
    for deltas in parts.deltas.values():
        assert torch.equal(deltas[0], deltas[2])


def test_the_parts_take_the_memory_of_one(tv):
    deltas = Merged([Mean()])(tv).deltas["0.weight"]
    assert isinstance(deltas, Packed)
    assert deltas.nbytes == tv.deltas["0.weight"][0].nbytes + 3 * 8


def test_pieces_of_large_tensors_are_put_together(monkeypatch, tv):
    expected = Merged([Mean()])(tv)
    monkeypatch.setattr(module, "PIECE", 7)
    found = Merged([Mean()])(tv)
    assert all(torch.equal(found.deltas[name].shared, deltas.shared) for name, deltas in expected.deltas.items())


def test_files_are_merged_too(base, experts, tv, tmp_path):
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = {task: tmp_path / f"{task}.safetensors" for task in experts}
    found = Merged([Trim(0.3), ElectSign()])(TaskVectors.open(tmp_path / "base.safetensors", paths))
    assert found.fingerprints == tv.fingerprints
    expected = Merged([Trim(0.3), ElectSign()])(tv)
    assert all(torch.equal(found.deltas[name].shared, deltas.shared) for name, deltas in expected.deltas.items())


def test_statistics_keep_their_deltas():
    state = nn.BatchNorm1d(4).double().state_dict()
    tv = TaskVectors.from_state_dicts(state, {t: {n: v + k + 1 for n, v in state.items()} for k, t in enumerate("ab")})
    assert torch.equal(Merged([TaskArithmetic()])(tv).deltas["running_var"], tv.deltas["running_var"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "expected one merging rule, got 0"),
        ([Mean(), TaskArithmetic()], "expected one merging rule, got 2"),
        ([Emr()], "Emr gives one model per task"),
    ],
)
def test_lists_that_merge_does_not_take_are_refused(rules, message):
    with pytest.raises(InputError, match=message):
        Merged(rules)


@pytest.mark.parametrize("step", [Rebase(), Cart()], ids=["Rebase", "Cart"])
def test_rules_that_move_the_base_are_refused(tv, step):
    with pytest.raises(InputError, match=f"one of {type(step).__name__} moves it: list it among the transforms"):
        Merged([step, Mean()])(tv)
