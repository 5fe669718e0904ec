"""Loaders against files that are broken or meant ill: errors of ours, and nothing runs, is written or takes memory."""

import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import malformed
import pytest
import torch
import yaml
from malformed import COUNTS, LAUGHS, MERGED, PICKLED, as_json, as_safetensors, as_yaml, files, refuses
from safetensors.torch import save_file

from adamerge import InputError, mergekit
from adamerge.adapters import open_expert
from adamerge.checkpoints import meta, open_state
from adamerge.coefficients import CoefficientTable, read_coefficients, write_coefficients
from adamerge.compressed import ENTRY, open_compressed, save_compressed
from adamerge.recipes import read
from adamerge.rules import Emr, Trim, transform
from adamerge.task_vectors import TaskVectors

STATE = {"0.weight": torch.arange(12.0).view(3, 4), "0.bias": torch.ones(3), "1.steps": torch.tensor(5)}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Models to refer to, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("base", "a", "b"):
        Path(name).mkdir()
        save_file({key: value + 0 for key, value in STATE.items()}, Path(name, "model.safetensors"))
        Path(name, "config.json").write_text("{}")


def everything(path: Path) -> None:
    """All that a state offers."""
    state = open_state(path)
    for name in state:
        meta(state, name)
        state[name].add(0)


def torch_bytes(value: object, zipped: bool = True) -> bytes:
    path = Path("made.pt")
    try:
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        return path.read_bytes()
    except RecursionError:
        return b"("
    finally:
        path.unlink(missing_ok=True)


class Trap:
    def __reduce__(self):
        import os

        return os.mkdir, ("caught",)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "legacy"])
def test_torch_files(count, zipped):
    traps = (torch_bytes(Trap(), zipped), torch_bytes({"state_dict": STATE, "x": Trap()}, zipped), pickle.dumps(Trap()))
    made = files({"state_dict": STATE, "epoch": 3}, lambda value: torch_bytes(value, zipped), traps)
    refuses(everything, made, Path("s.pt"), count)


@pytest.mark.parametrize("count", COUNTS)
def test_safetensors_files(count):
    save_file(STATE, "valid.safetensors")
    content = Path("valid.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    more = (struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 10**8 + 1) + b"{}", b"\0" * 8, content + content)
    refuses(everything, files(header, lambda value: as_safetensors(value, data), more), Path("s.safetensors"), count)


@pytest.mark.parametrize("count", COUNTS)
def test_indexes_of_shards(count):
    Path("sharded").mkdir()
    save_file(STATE, "sharded/one.safetensors")
    valid = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(STATE, "one.safetensors")}
    path = Path("sharded/model.safetensors.index.json")
    refuses(lambda path: everything(path.parent), files(valid, as_json), path, count)


@pytest.mark.parametrize("count", COUNTS)
def test_files_of_coefficients(count):
    rows = {"w": {"a": [0.3, 0.1], "b": [0.1, 0.2]}, "v": {"a": 0.1, "b": 0.4}}
    write_coefficients(CoefficientTable(rows, {"base": "0" * 64}), "valid.json")
    valid = json.loads(Path("valid.json").read_text())
    refuses(read_coefficients, files(valid, as_json), Path("c.json"), count)


@pytest.mark.parametrize("count", COUNTS)
def test_recipes(count):
    rules = [{"Trim": {"keep": 0.2}}, {"class_path": "adamerge.rules.ElectSign", "init_args": {"combine": "mean"}}]
    valid = {"base": "base", "experts": {"a": "a", "b": "b"}, "rules": rules, "scale": 0.3, "exclude": ["x"]}
    valid |= {"seed": 1, "dtype": "float32", "device": "cpu", "shard_size": "5GB", "tokenizer": "base"}
    more = (
        LAUGHS.encode(),
        MERGED.encode(),
        PICKLED.encode(),
        b"a: &a [*a]",
        b"[" * 5000,
        b"base: &a [*a]\nexperts: *a",
    )
    refuses(read, files(valid, as_yaml, more), Path("recipe.yaml"), count)


@pytest.mark.parametrize("count", COUNTS)
def test_files_of_mergekit(count):
    models = [{"model": name, "parameters": {"weight": [0.2, 0.8], "density": 0.5}} for name in ("a", "b")]
    valid = {"merge_method": "ties", "base_model": "base", "models": models, "parameters": {"normalize": True}}
    valid |= {"dtype": "float32", "tokenizer_source": "base"}
    more = (f"merge_method: ties\n{LAUGHS}".encode(), f"merge_method: {PICKLED}".encode(), b"[" * 5000)
    refuses(mergekit.read, files(valid, as_yaml, more), Path("mergekit.yaml"), count)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rule", [Trim(keep=0.5), Emr()], ids=["dense", "packed"])
def test_compressed_experts(count, rule):
    vectors = TaskVectors.from_state_dicts(
        STATE, {task: {**STATE, "0.weight": STATE["0.weight"] + k} for k, task in enumerate("ab", 1)}
    )
    save_compressed(transform(vectors, [rule]), "valid.safetensors")
    content = Path("valid.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    header["__metadata__"][ENTRY] = json.loads(header["__metadata__"][ENTRY])

    def write(value: object) -> bytes:
        try:
            kept = {**value, "__metadata__": dict(value["__metadata__"])}
            kept["__metadata__"][ENTRY] = as_json(kept["__metadata__"][ENTRY]).decode()
        except (TypeError, KeyError, ValueError):
            kept = value
        return as_safetensors(kept, data)

    def use(path: Path) -> None:
        for task in (found := open_compressed(path, STATE)).tasks:
            found.expert(task)

    refuses(use, files(header, write), Path("c.safetensors"), count)


@pytest.mark.parametrize("count", COUNTS)
def test_adapters(count):
    Path("adapter").mkdir()
    name = "base_model.model.0"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(3, 2)}
    save_file(factors, "adapter/adapter_model.safetensors")
    valid = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"0": 2}, "alpha_pattern": {}}
    valid |= {"init_lora_weights": True, "use_rslora": False, "fan_in_fan_out": False, "use_dora": False}
    valid |= {"target_modules": ["0"], "lora_bias": False}
    path = Path("adapter/adapter_config.json")

    def use(path: Path) -> None:
        dict(open_expert(path.parent, STATE))

    refuses(use, files(valid, as_json), path, count)


# -- what was found or thought of --------------------------------------------------------------------------------------


def sparse() -> torch.Tensor:
    place = torch.zeros(2, 1, dtype=torch.int64)
    return torch.sparse_coo_tensor(place, torch.ones(1), (10**6, 10**6), check_invariants=True)


def test_an_archive_that_unpacks_to_more_than_it_is(tmp_path):
    torch.save(STATE, "whole.pt")
    with zipfile.ZipFile("whole.pt") as whole, zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in whole.infolist():
            bomb.writestr(part.filename, whole.read(part) + (b"0" * 10**7 if part.filename.endswith("pkl") else b""))
    assert Path("bomb.pt").stat().st_size < 10**5
    with pytest.raises(InputError, match=r"bomb\.pt cannot be read: it claims to hold more than it does"):
        open_state("bomb.pt")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(()).expand(10**6, 10**6), "w claims 4000000000000 bytes, more than the file has"),
        (sparse(), "w is sparse"),
        (torch.empty(10**6, 10**6, device="meta"), "w is sparse, quantised or empty-handed"),
    ],
    ids=["expanded", "sparse", "meta"],
)
def test_a_tensor_that_is_larger_than_its_file(tensor, message):
    torch.save({"w": tensor}, "s.pt")
    with pytest.raises(InputError, match=rf"s\.pt: {message}"):
        open_state("s.pt")


def test_an_empty_tensor_of_no_possible_shape():
    header = {"w": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}
    Path("s.safetensors").write_bytes(as_safetensors(header, b""))
    with pytest.raises(InputError, match=r"s\.safetensors cannot be read"):
        open_state("s.safetensors")


@pytest.mark.parametrize(
    ("offsets", "data"), [(((0, 8), (4, 12)), 12), (((0, 8), (8, 20)), 16), (((0, 8), (12, 20)), 20)],
    ids=["overlap", "beyond the end", "hole"],
)  # fmt: skip
def test_offsets_that_cannot_be(offsets, data):
    header = {f"w{n}": {"dtype": "F32", "shape": [2], "data_offsets": list(at)} for n, at in enumerate(offsets)}
    Path("s.safetensors").write_bytes(as_safetensors(header, b"\0" * data))
    with pytest.raises(InputError, match=r"s\.safetensors cannot be read as safetensors"):
        open_state("s.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 50000 values"),
        (MERGED, "more than 50000 values"),
        ("a: &a [*a]", "nested without end"),
        ("[" * 5000, "nested without end"),
        (PICKLED, "could not determine a constructor"),
    ],
    ids=["aliases", "merged keys", "itself", "brackets", "objects"],
)
@pytest.mark.parametrize("method", ["", "merge_method: ties\n"], ids=["recipe", "mergekit"])
def test_yaml_that_is_no_end(text, message, method):
    Path("r.yaml").write_text(
        text if method == "" else f"{method}x:\n" + "".join(f"  {line}\n" for line in text.split("\n"))
    )
    with pytest.raises(InputError, match=rf"(?s)r\.yaml.*{message}"):
        (mergekit.read if method else read)(Path("r.yaml"))


@pytest.mark.parametrize("spec", [malformed.CALL, malformed.SHELL, malformed.POPEN, malformed.EVAL, "os.getcwd"])
@pytest.mark.parametrize("place", [lambda spec: [spec], lambda spec: [{"Fold": {"rule": spec}}]], ids=["rule", "inner"])
def test_a_recipe_calls_nothing(spec, place):
    valid = {"base": "base", "experts": {"a": "a"}, "rules": place(spec)}
    Path("r.yaml").write_text(yaml.safe_dump(valid))
    with pytest.raises(InputError, match=re.escape("os.") + "|Popen|eval|getcwd"):
        read(Path("r.yaml"))
    assert not Path("caught").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 3}, "experts"),
        ({"experts": {3: "a"}}, "an expert cannot be called 3"),
        ({"merge_method": ["ties"]}, r"merge_method \['ties'\] is not supported"),
        ({"merge_method": "ties", "dtype": {"x": 1}, "models": [{"model": "a"}]}, r"dtype {'x': 1} is not supported"),
    ],
)
def test_values_of_another_type_are_named(change, message):
    whole = {"base_model": "b"} if "merge_method" in change else {"base": "b", "experts": {}}
    Path("recipe.yaml").write_text(yaml.safe_dump({**whole, **change}))
    with pytest.raises(InputError, match=message):
        read(Path("recipe.yaml"))
