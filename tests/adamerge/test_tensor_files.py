"""The safetensors format: rows as the library reads them, headers as it accepts them, and no mapped pages."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adamerge import InputError
from adamerge.tensor_files import SafetensorsState, header, names_in

STATE = {
    "matrix": torch.randn(9, 5),
    "half": torch.randn(4, 3, 2).half(),
    "brain": torch.randn(11).bfloat16(),
    "eight": torch.randn(6).to(torch.float8_e4m3fn),
    "double": torch.randn(3, 1, dtype=torch.float64),
    "long": torch.arange(5),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5),
    "none": torch.zeros(0, 7),
}


@pytest.fixture
def state(tmp_path) -> SafetensorsState:
    save_file(STATE, tmp_path / "s.safetensors")
    return SafetensorsState(dict.fromkeys(STATE, tmp_path / "s.safetensors"))


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("name", STATE)
def test_tensors_and_rows_are_those_of_the_file(state, name):
    expected = STATE[name]
    assert (state[name].shape, state[name].dtype, bits(state[name])) == (expected.shape, expected.dtype, bits(expected))
    assert (state.meta(name).shape, state.meta(name).dtype) == (expected.shape, expected.dtype)
    if expected.dim():
        for rows in (slice(0, 2), slice(1, 3), slice(2, None), slice(None), slice(3, 100), slice(2, 2)):
            part = state.rows(name, rows)
            assert part.shape == expected[rows].shape
            assert bits(part) == bits(expected[rows])


def test_what_is_read_is_the_callers_own(state):
    state["matrix"].zero_()
    assert torch.equal(state["matrix"], STATE["matrix"])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="shows on Linux alone")
def test_one_file_at_a_time_is_open_and_none_afterwards(tmp_path):
    def opened() -> list[str]:
        links = (Path(link) for link in Path("/proc/self/fd").iterdir())
        return [os.readlink(link) for link in links if link.is_symlink() and str(tmp_path) in os.readlink(link)]

    files = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "c")}
    for n, (name, path) in enumerate(files.items()):
        save_file({name: torch.full((3,), float(n))}, path)
    state = SafetensorsState(files)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(state.__getitem__, "abcabcbacc" * 20))
    assert [int(tensor[0]) for tensor in read] == ["abc".index(name) for name in "abcabcbacc" * 20]
    assert len(opened()) == 1
    del state
    assert opened() == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows on Linux alone")
def test_files_are_not_mapped(state):
    value = state["matrix"]
    assert "s.safetensors" not in Path("/proc/self/maps").read_text()
    assert value.shape == (9, 5)


def test_the_library_opens_a_file_of_our_header(tmp_path):
    path = tmp_path / "ours.safetensors"
    body = b"".join(bytes(bits(value)) for value in STATE.values())
    path.write_bytes(header(STATE, {"format": "pt"}) + body)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(STATE) == sorted(names_in(path))
        for name, value in STATE.items():
            assert bits(file.get_tensor(name)) == bits(value)


def test_a_file_that_shrinks_while_it_is_read_is_named(state, tmp_path):
    path = tmp_path / "s.safetensors"
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(InputError, match=r"s\.safetensors ends within \w+: it was changed while it was read"):
        [state[name] for name in STATE]
