"""Reading weights from whatever they come in; never running a pickle; one sentence for every broken file."""

import json
import os
import re
from fnmatch import fnmatch
from pathlib import Path

import lightning as L
import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn

from adamerge import InputError
from adamerge.checkpoints import hub_folder, meta, open_state, read_extra

STATE = {
    "0.weight": torch.arange(12.0).view(3, 4),
    "0.bias": torch.ones(3, dtype=torch.float16),
    "1.steps": torch.tensor(5),
    "1.scale": torch.tensor(2.5, dtype=torch.bfloat16),
}


def same(left, right) -> bool:
    """Same names, dtypes and bits."""
    return set(left) == set(right) and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


def write_shards(folder: Path, stem: str = "model", suffix: str = "safetensors") -> Path:
    """STATE in two files and their index, as the Hub keeps large models."""
    folder.mkdir(exist_ok=True)
    files = {name: f"{stem}-0000{name[0]}-of-00002.{suffix}" for name in STATE}
    for file in set(files.values()):
        part = {name: value for name, value in STATE.items() if files[name] == file}
        torch.save(part, folder / file) if suffix == "bin" else save_file(part, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return index


# -- what can be read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["s.safetensors", "s.pt", "s.pth", "s.bin", "s.ckpt"])
@pytest.mark.parametrize("kind", [str, Path])
def test_files_of_tensors(tmp_path, file, kind):
    path = tmp_path / file
    save_file(STATE, path) if path.suffix == ".safetensors" else torch.save(STATE, path)
    assert same(open_state(kind(path)), STATE)


def test_torch_files_of_before_version_1_6(tmp_path):
    torch.save(STATE, tmp_path / "s.pt", _use_new_zipfile_serialization=False)
    assert same(open_state(tmp_path / "s.pt"), STATE)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows on Linux alone")
def test_torch_files_are_memory_mapped(tmp_path):
    torch.save({"state_dict": STATE}, tmp_path / "s.pt")
    state = open_state(tmp_path / "s.pt")
    assert str(tmp_path / "s.pt") in Path("/proc/self/maps").read_text()
    assert same(state, STATE)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file(tmp_path, file):
    save_file(STATE, tmp_path / file) if file.endswith("safetensors") else torch.save(STATE, tmp_path / file)
    assert same(open_state(tmp_path), STATE)


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_a_folder_with_shards(tmp_path, stem, suffix):
    write_shards(tmp_path, stem, suffix)
    assert same(open_state(tmp_path), STATE)


def test_a_folder_with_both_is_read_from_safetensors(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert same(open_state(tmp_path), STATE)


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"], ids=["sharded", "whole"])
def test_a_folder_that_transformers_wrote(tmp_path, shard_size):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = CLIPVisionModel(config)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard_size == "20KB")
    state = open_state(tmp_path)
    assert same(state, {n: v for n, v in model.state_dict().items() if n in state})
    assert set(dict(model.named_parameters())) <= set(state)


class Module(L.LightningModule):
    """A backbone inside a Lightning module, with hyperparameters in its checkpoint."""

    def __init__(self, width: int = 3, name: str = "x") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone, self.head = nn.Linear(4, width), nn.Linear(width, 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def test_a_checkpoint_that_lightning_wrote(tmp_path):
    module = Module()
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert same(open_state(tmp_path / "last.ckpt"), module.state_dict())
    assert same(open_state(tmp_path / "last.ckpt", prefix="backbone."), module.backbone.state_dict())
    assert read_extra(tmp_path / "last.ckpt", "hyper_parameters") == {"width": 3, "name": "x"}
    assert read_extra(tmp_path / "last.ckpt", "classes") is None


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_prefix_keeps_one_submodule(tmp_path, suffix):
    path = tmp_path / f"s{suffix}"
    save_file(STATE, path) if suffix == ".safetensors" else torch.save(STATE, path)
    state = open_state(path, prefix="1.")
    assert same(state, {"steps": STATE["1.steps"], "scale": STATE["1.scale"]})
    assert "steps" in state
    assert "1.steps" not in state
    assert len(state) == 2
    assert meta(state, "scale").dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"has no tensor under 'encoder\.'; its names begin with 0, 1"):
        open_state(path, prefix="encoder.")


def test_shape_and_dtype_come_without_the_data(tmp_path):
    save_file(STATE, tmp_path / "s.safetensors")
    state = open_state(tmp_path / "s.safetensors")
    for name, value in STATE.items():
        shown = meta(state, name)
        assert shown.is_meta
        assert (shown.shape, shown.dtype) == (value.shape, value.dtype)
        assert name in state
    assert "other" not in state


# -- hub ids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "timm/vit_base_patch16_clip_224.openai", "a/b-1.5"])
def test_a_hub_id_is_fetched_into_the_hubs_cache(tmp_path, monkeypatch, name):
    save_file(STATE, tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path))
    assert same(open_state(name), STATE)
    assert asked == [name]


def test_what_a_model_needs_beside_its_weights_is_fetched_too(tmp_path, monkeypatch):
    save_file(STATE, tmp_path / "model.safetensors")
    patterns = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: patterns.extend(allow_patterns) or str(tmp_path),
    )
    hub_folder("a/b")
    needed = ["config.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "model.safetensors"]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in needed)
    assert not any(fnmatch(name, pattern) for pattern in patterns for name in ("pytorch_model.bin", "tf_model.h5"))


@pytest.mark.parametrize("name", ["openai/no-such-model", "-a/b--c"])
def test_a_hub_id_that_cannot_be_fetched(name):
    with pytest.raises(InputError, match=f"'{name}' is no local file or folder and could not be fetched from the Hub"):
        open_state(name)


@pytest.mark.parametrize("name", ["models/expert.pt", "runs/last.safetensors", "a/b/c", "expert"])
def test_a_file_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(InputError, match=f"no such checkpoint: {name}"):
        open_state(name)


def test_a_folder_that_is_there_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such checkpoint: models/expert"):
        open_state("models/expert")


# -- pickles -----------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda trap: trap, lambda trap: {"state_dict": STATE, "callback": trap}])
def test_a_pickle_is_refused_and_nothing_runs(tmp_path, zipped, wrap):
    torch.save(wrap(Trap(tmp_path / "caught")), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    for read in (open_state, lambda path: read_extra(path, "callback")):
        with pytest.raises(InputError, match=r"m\.pt holds pickled Python objects, which could run code"):
            read(tmp_path / "m.pt")
    assert not (tmp_path / "caught").exists()


def test_the_trap_works(tmp_path):
    torch.save(Trap(tmp_path / "caught"), tmp_path / "m.pt")
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert (tmp_path / "caught").exists()


def test_the_two_lines_of_the_message_convert_it(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(InputError, match="convert it once:") as error:
        open_state(tmp_path / "m.pt")
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 2
    exec("\n".join(line.strip() for line in lines), {"torch": torch, "safetensors": safetensors})
    assert same(open_state(tmp_path / "m.safetensors"), model.state_dict())


# -- broken files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["s.safetensors", "s.pt", "legacy.pt"])
def test_a_file_cut_anywhere_is_refused_by_its_name(tmp_path, file):
    whole, cut = tmp_path / file, tmp_path / f"cut{Path(file).suffix}"
    if whole.suffix == ".safetensors":
        save_file(STATE, whole)
    else:
        torch.save(STATE, whole, _use_new_zipfile_serialization=whole.stem != "legacy")
    content = whole.read_bytes()
    for size in (*range(40), *range(40, len(content), 23), len(content) - 1):
        cut.write_bytes(content[:size])
        with pytest.raises(InputError, match=f"{re.escape(str(cut))} (cannot be read|holds pickled)"):
            dict(open_state(cut))
    cut.write_bytes(content)
    assert same(open_state(cut), STATE)


@pytest.mark.parametrize("content", [b"hello, this is text", bytes(range(256)) * 4, b"PK\x03\x04 no archive"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_other_bytes_are_refused(tmp_path, content, suffix):
    path = tmp_path / f"s{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        open_state(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list; expected a dict of tensors"),
        (torch.zeros(2), "holds a Tensor; expected a dict of tensors"),
        ({"state_dict": [1]}, "state_dict is a list; expected a dict of tensors"),
        ({"epoch": 3}, "is not a state dict: 'epoch' is no tensor"),
        ({"w": torch.zeros(2), "model": {}}, "is not a state dict: 'model' is no tensor"),
        ({"state_dict": {}}, "holds no tensor"),
    ],
)
def test_a_torch_file_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(InputError, match=rf"s\.pt:? {message}"):
        open_state(tmp_path / "s.pt")


def test_an_unknown_suffix(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"weights\.h5: unknown format; expected \.safetensors, \.pt, \.pth, \.bin, \.ckpt"
    ):
        open_state(tmp_path / "weights.h5")


def test_a_dtype_that_torch_cannot_merge(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "s.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    state = open_state(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="w is stored as F8_E8M0, which cannot be merged"):
        meta(state, "w")


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"holds no model\.safetensors, no pytorch_model\.bin and no index of either"):
        open_state(tmp_path)


# -- broken indices ----------------------------------------------------------------------------------------------------


def edit(index: Path, weight_map: dict[str, object]) -> None:
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "weight_map": {**content["weight_map"], **weight_map}}))


@pytest.mark.parametrize("escape", ["../secret.safetensors", "sub/secret.safetensors", "{tmp}/secret.safetensors"])
def test_an_index_leads_nowhere_else(tmp_path, escape):
    index, escape = write_shards(tmp_path / "model"), escape.format(tmp=tmp_path)
    (tmp_path / "model/sub").mkdir()
    save_file({"w": torch.zeros(1)}, index.parent / escape)
    edit(index, {"w": escape})
    with pytest.raises(InputError, match=re.escape(f"{index}: shard '{escape}' is not a plain file name")):
        open_state(tmp_path / "model")


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_an_index_names_files_not_folders(tmp_path, name):
    edit(write_shards(tmp_path / "model"), {"w": name})
    with pytest.raises(InputError, match="shard"):
        open_state(tmp_path / "model")


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_an_index_that_names_what_is_not_there(tmp_path, stem, suffix):
    index = write_shards(tmp_path, stem, suffix)
    shard = f"{stem}-00001-of-00002.{suffix}"
    edit(index, {"2.weight": shard})
    with pytest.raises(InputError, match=rf"index\.json: tensor 2\.weight is not in shard {shard}"):
        open_state(tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(InputError, match=rf"index\.json: shard {shard} is missing"):
        open_state(tmp_path)


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_a_truncated_shard_is_named(tmp_path, stem, suffix):
    write_shards(tmp_path, stem, suffix)
    shard = tmp_path / f"{stem}-00000-of-00002.{suffix}"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{re.escape(str(shard))} cannot be read.* it may be truncated"):
        open_state(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not an index of shards"),
        ("[]", "is not an index of shards"),
        ("{}", "is not an index of shards"),
        ('{"weight_map": ["w"]}', "weight_map must map tensor names to file names"),
        ('{"weight_map": {"w": 3}}', "weight_map must map tensor names to file names"),
    ],
)
def test_an_index_that_is_none(tmp_path, content, message):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=message):
        open_state(tmp_path)


def test_an_index_of_other_bytes_is_not_quoted(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(b"\xff" * 30_000)
    with pytest.raises(InputError, match="is not an index of shards: UnicodeDecodeError: ") as refused:
        open_state(tmp_path)
    assert len(str(refused.value)) < 1000
