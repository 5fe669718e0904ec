"""Heads that are tied to embeddings, kept in some files and left out of others; and tensors on another device."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adamerge import InputError, merge
from adamerge.recipes import job, parse
from adamerge.rules import Mean
from adamerge.views import OnDevice

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def write(folder: Path, value: float, head: float | None, tied: bool) -> None:
    folder.mkdir()
    state = {EMBEDDING: torch.full((3, 2), value)} | ({} if head is None else {HEAD: torch.full((3, 2), head)})
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))


@pytest.mark.parametrize(
    ("base", "expert", "expected"),
    [
        (None, (2.0, True), {EMBEDDING: 2.0}),  # the head of a tied expert goes
        (1.0, (None, True), {EMBEDDING: 2.0, HEAD: 2.0}),  # and where the base has one, it is the embedding
        (1.0, (5.0, False), {EMBEDDING: 2.0, HEAD: 5.0}),
    ],
)
def test_heads_are_those_of_the_base(tmp_path, base, expert, expected):
    write(tmp_path / "base", 1.0, base, tied=base is None)
    write(tmp_path / "x", 2.0, *expert)
    asked = job(parse({"base": "base", "experts": {"x": "x"}}), tmp_path)
    merged = merge(asked.task_vectors, [Mean()])
    assert {name: value[0, 0].item() for name, value in merged.items()} == expected


def test_a_head_of_its_own_does_not_go_lost(tmp_path):
    write(tmp_path / "base", 1.0, None, tied=True)
    write(tmp_path / "x", 2.0, 5.0, tied=False)
    with pytest.raises(InputError, match=r"expert 'x' .* not in the base lm_head\.weight"):
        job(parse({"base": "base", "experts": {"x": "x"}}), tmp_path)


def test_tensors_go_to_a_device_as_they_are_read():
    view = OnDevice({"w": torch.ones(4, 2)}, torch.device("meta"))
    assert view["w"].device == view.rows("w", slice(1, 3)).device == torch.device("meta")
    assert view.rows("w", slice(1, 3)).shape == (2, 2)
    assert list(view) == ["w"]
    assert "w" in view
    assert "v" not in view
    assert len(view) == 1
    assert view.meta("w").shape == (4, 2)
