"""Fingerprints: the same tensors give the same digest, whatever held them; anything else gives another."""

import hashlib
import re

import pytest
import torch
from safetensors.torch import save_file

from adamerge.checkpoints import open_state
from adamerge.fingerprint import fingerprint

STATE = {
    "b.weight": torch.arange(6.0).view(2, 3),
    "a": torch.tensor([1, 2], dtype=torch.int64),
    "scale": torch.tensor(2.5),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
}


def test_it_is_a_sha256_of_names_dtypes_shapes_and_bytes():
    state = {"w": torch.tensor([1.0, 2.0])}
    expected = hashlib.sha256(b"w|torch.float32|(2,)|" + b"\x00\x00\x80\x3f" + b"\x00\x00\x00\x40").hexdigest()
    assert fingerprint(state) == expected
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(STATE))


def test_the_order_and_the_layout_of_tensors_are_nothing_to_it():
    reordered = dict(reversed(STATE.items()))
    reordered["b.weight"] = STATE["b.weight"].T.contiguous().T
    assert not reordered["b.weight"].is_contiguous()
    reordered["a"] = torch.tensor([1, 0, 2, 0])[::2]
    assert fingerprint(reordered) == fingerprint(STATE)


@pytest.mark.parametrize("file", ["s.safetensors", "s.pt", "s.bin", "s.ckpt", "legacy.pth"])
def test_the_file_format_is_nothing_to_it(tmp_path, file):
    path = tmp_path / file
    if path.suffix == ".safetensors":
        save_file(STATE, path)
    else:
        content = {"state_dict": STATE} if path.suffix == ".ckpt" else STATE
        torch.save(content, path, _use_new_zipfile_serialization=path.stem != "legacy")
    assert fingerprint(open_state(path)) == fingerprint(STATE)


CHANGES = {
    "name": {"b.weights": STATE["b.weight"]},
    "shape": {"b.weight": STATE["b.weight"].view(3, 2)},
    "dtype of the same bytes": {"b.weight": STATE["b.weight"].view(torch.int32)},
    "dtype of the same values": {"b.weight": STATE["b.weight"].double()},
    "one bit": {"b.weight": torch.nextafter(STATE["b.weight"], torch.tensor(9.0))},
    "the sign of zero": {"b.weight": STATE["b.weight"] * torch.tensor([[-1.0, 1, 1], [1, 1, 1]])},
    "the shape of nothing": {"none": torch.zeros(4, 0)},
    "a further tensor": {"c": torch.zeros(1)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_shows(change):
    state = {**STATE, **change}
    if "b.weights" in change:
        del state["b.weight"]
    assert fingerprint(state) != fingerprint(STATE)


def test_values_that_change_places_show():
    left, right = torch.zeros(2), torch.ones(2)
    assert fingerprint({"a": left, "b": right}) != fingerprint({"a": right, "b": left})


def test_chosen_names_alone():
    assert fingerprint(STATE, ["half", "a"]) == fingerprint({name: STATE[name] for name in ("a", "half")})


def test_a_graph_is_nothing_to_it():
    assert fingerprint({"w": torch.ones(2, requires_grad=True)}) == fingerprint({"w": torch.ones(2)})
