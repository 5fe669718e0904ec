"""Tiny models in the working directory, and mergekit files run on them."""

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adamerge.merge import plan
from adamerge.mergekit import read
from adamerge.recipes import Job

State = dict[str, Tensor]


def state(seed: int) -> State:
    """Embedding, five layers of two matrices, norm and head."""
    rng = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (4, 3),
        "model.norm.weight": (3,),
        "lm_head.weight": (4, 3),
    }
    for layer in range(5):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (3, 3)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (5, 3)
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.fixture
def save(tmp_path) -> Callable[[str, State], None]:
    """Writes a model under a name, with a config of five layers."""

    def write(name: str, tensors: State) -> None:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": 5}))

    return write


@pytest.fixture
def models(tmp_path, monkeypatch, save) -> dict[str, State]:
    """Folders zero (the base), one, two, three (near it) and far in the working directory, and what they hold."""
    monkeypatch.chdir(tmp_path)
    base = state(0)
    found = {"zero": base, "far": state(9)}
    for seed, name in enumerate(("one", "two", "three"), 1):
        found[name] = {key: base[key] + 0.1 * value for key, value in state(seed).items()}
    for name, tensors in found.items():
        save(name, tensors)
    return found


@pytest.fixture
def job(tmp_path) -> Callable[..., Job]:
    """The job of a mergekit file with this text."""

    def make(text: str, **arguments: int) -> Job:
        (tmp_path / "merge.yml").write_text(text)
        return read(tmp_path / "merge.yml", **arguments)

    return make


@pytest.fixture
def run(job) -> Callable[..., State]:
    """What a mergekit file with this text gives."""

    def merge(text: str, **arguments: int) -> State:
        found = job(text, **arguments)
        return dict(plan(found.task_vectors, found.rules, found.scale, found.exclude, found.dtype))

    return merge
