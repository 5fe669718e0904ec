"""Compressed experts in files: bit for bit the same, small, and tied to their base."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adamerge import InputError, TaskVectors, merge, open_compressed, save_compressed
from adamerge.deltas import dense
from adamerge.rules import ComPeft, Emr, OneBit, Prune, Rebase, Store, TallMask, TruncatedSVD, transform

STEPS = {
    "nothing": [],
    "EMR": [Emr()],
    "TALL": [TallMask()],
    "one bit": [OneBit()],
    "ComPEFT": [ComPeft(0.3)],
    "sparse": [Prune(0.3)],
    "low rank": [TruncatedSVD(1)],
    "half": [Store()],
    "bytes": [Store("int8")],
    "another base": [Rebase(), OneBit()],
}
every_form = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_experts_come_back_bit_for_bit(base, experts, tmp_path, steps, dtype):
    states = {task: {n: v.to(dtype) for n, v in state.items()} for task, state in {"base": base, **experts}.items()}
    tv = transform(TaskVectors.from_state_dicts(states.pop("base"), states), steps)
    found = open_compressed(save_compressed(tv, tmp_path / "experts.safetensors"), tv.base)
    assert found.tasks == tv.tasks
    assert found.fingerprints == tv.fingerprints
    assert found.rows == tv.rows
    for name, deltas in tv.deltas.items():
        assert type(found.deltas[name]) is type(deltas)
        assert found.deltas[name].dtype == deltas.dtype
        assert found.deltas[name].nbytes == deltas.nbytes
    for task in tv.tasks:
        expert = tv.expert(task)
        for name, value in found.expert(task).items():
            assert value.dtype == expert[name].dtype
            assert torch.equal(value, expert[name])


def test_a_base_in_a_file_and_experts_that_are_read_when_asked_for(base, experts, tv, tmp_path):
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    lazy = TaskVectors.open(tmp_path / "base.safetensors", {task: tmp_path / f"{task}.safetensors" for task in experts})
    path = save_compressed(transform(lazy, [Emr()]), tmp_path / "emr.safetensors")
    found, expected = open_compressed(path, tmp_path / "base.safetensors"), transform(tv, [Emr()])
    for task in experts:
        assert all(torch.equal(found.expert(task)[name], value) for name, value in expected.expert(task).items())


@pytest.mark.parametrize(("rule", "bits"), [(OneBit(), 8), (ComPeft(), 16), (Emr(), 32 + 8), (TallMask(), 32 + 8)])
def test_eight_experts_take_as_many_bits_an_element(tmp_path, rule, bits):
    base = {"w": torch.randn(200, 300), "frozen": torch.randn(200, 300)}
    experts = {str(k): {"w": base["w"] + torch.randn(200, 300), "frozen": base["frozen"]} for k in range(8)}
    tv = transform(TaskVectors.from_state_dicts(base, experts), [rule])
    path = save_compressed(tv, tmp_path / "experts.safetensors")
    assert 0 <= path.stat().st_size - 200 * 300 * bits / 8 < 3000


def test_statistics_ties_and_integers_survive(tmp_path):
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    states = []
    for shift in range(3):
        state = {name: value + shift * torch.rand(value.shape) for name, value in network.state_dict().items()}
        state["1.num_batches_tracked"] = torch.tensor(shift)
        states.append({**state, "head": state["0.weight"]})
    tv = transform(TaskVectors.from_state_dicts(states[0], {"a": states[1], "b": states[2]}), [Emr()])
    found = open_compressed(save_compressed(tv, tmp_path / "experts.safetensors"), states[0])
    for task in "ab":
        expert = tv.expert(task)
        assert all(torch.equal(value, expert[name]) for name, value in found.expert(task).items())
        assert torch.equal(expert["head"], expert["0.weight"])
    assert torch.equal(dense(found.deltas["1.running_var"]), tv.deltas["1.running_var"])
    merged = merge(tv, scale=0.3)
    assert all(torch.equal(value, merged[name]) for name, value in merge(found, scale=0.3).items())


def test_another_base_is_refused(base, tv, tmp_path):
    path = save_compressed(transform(tv, [OneBit()]), tmp_path / "experts.safetensors")
    other = {name: value + 1e-9 for name, value in base.items()}
    with pytest.raises(InputError, match=f"experts of another base: its fingerprint is {tv.fingerprints['base'][:12]}"):
        open_compressed(path, other)


def test_experts_around_another_base_want_that_one(base, tv, tmp_path):
    moved = transform(tv, [Rebase(), OneBit()])
    path = save_compressed(moved, tmp_path / "experts.safetensors")
    assert open_compressed(path, merge(tv, scale=0.3)).tasks == tv.tasks
    with pytest.raises(InputError, match="experts of another base"):
        open_compressed(path, base)


def test_other_files_are_refused(base, tv, tmp_path):
    with pytest.raises(InputError, match=r"experts\.pt: compressed experts are written to a \.safetensors file"):
        save_compressed(tv, tmp_path / "experts.pt")
    save_file(base, tmp_path / "base.safetensors")
    with pytest.raises(InputError, match=r"base\.safetensors holds no compressed experts"):
        open_compressed(tmp_path / "base.safetensors", base)
    with pytest.raises(InputError, match="no such checkpoint"):
        open_compressed(tmp_path / "nothing.safetensors", base)
