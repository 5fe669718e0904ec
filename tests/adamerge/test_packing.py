"""Experts in few bits, from a recipe to a file and back to folders."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge import TaskVectors
from adamerge.__main__ import main
from adamerge.rules import OneBit, transform


@pytest.fixture
def adamerge(tmp_path, monkeypatch):
    """The command, in a folder with a base, two experts and a recipe."""
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.randn(30, 20), "b": torch.randn(20)}, tmp_path / name / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "none"}')

    def call(*arguments: str, **recipe) -> None:
        values = {"base": "base", "experts": {"a": "a", "b": "b"}, "rules": ["OneBit"], **recipe}
        (tmp_path / "recipe.yaml").write_text(json.dumps(values))
        monkeypatch.setattr("sys.argv", ["adamerge", *arguments])
        main()

    return call


def test_an_expert_comes_back_as_its_bits_have_it(adamerge, tmp_path, capsys):
    adamerge("compress", "recipe.yaml", "--output", "experts.safetensors")
    assert "written to experts.safetensors: " in capsys.readouterr().err
    assert (tmp_path / "experts.safetensors").stat().st_size < (tmp_path / "a" / "model.safetensors").stat().st_size
    adamerge("expand", "experts.safetensors", "b", "--base", "base", "--output", "again")
    vectors = TaskVectors.open(tmp_path / "base", {task: tmp_path / task for task in "ab"})
    expected = transform(vectors, [OneBit()]).expert("b")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert (tmp_path / "again" / "config.json").is_file()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"rules": ["OneBit", "Mean"]}, "Mean makes one model of all experts"),
        ({"scale": 0.5}, "scale, exclude, dtype and split_fused_qkv are about merges"),
        ({"rules": ["Emr", {"Trim": {"keep": 0.1}}]}, "Trim after Emr drops entries that have voted"),
    ],
    ids=["a rule that combines", "a scale", "an order without sense"],
)
def test_what_makes_no_sense_is_refused(adamerge, tmp_path, capsys, recipe, message):
    with pytest.raises(SystemExit):
        adamerge("compress", "recipe.yaml", "--output", "experts.safetensors", **recipe)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "experts.safetensors").exists()


def test_an_unknown_expert_is_named_before_a_folder_is_made(adamerge, tmp_path, capsys):
    adamerge("compress", "recipe.yaml", "--output", "experts.safetensors")
    with pytest.raises(SystemExit):
        adamerge("expand", "experts.safetensors", "c", "--base", "base", "--output", "again")
    assert "no expert is called 'c'; there are a, b" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_file_that_is_there_is_not_overwritten(adamerge, tmp_path, capsys):
    (tmp_path / "experts.safetensors").write_text("mine")
    with pytest.raises(SystemExit):
        adamerge("compress", "recipe.yaml", "--output", "experts.safetensors")
    assert "experts.safetensors exists already" in capsys.readouterr().err
    assert (tmp_path / "experts.safetensors").read_text() == "mine"
