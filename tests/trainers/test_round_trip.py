"""Checkpoints of every kind of learned part: what comes back computes what was saved."""

import logging

import pytest
import torch
from tiny_suite import TinySuite

from adamerge import InputError
from adamerge.rules import Prune, Rebase, TruncatedSVD
from modules import (
    BlockRouter,
    Coefficients,
    Entropy,
    FeatureRouter,
    PseudoLabels,
    RepresentationL1,
    Surgery,
    TaskBlock,
    TaskIdentity,
)
from trainers import Adaptation
from trainers.phases import Phase

PARTS = {
    "coefficients": lambda: {"coefficients": Coefficients("block", "softmax")},
    "router of blocks": lambda: {"router": BlockRouter(), "learn": ["router"]},
    "constant router": lambda: {"router": BlockRouter(depth=0)},
    "shared router": lambda: {"router": BlockRouter(shared=True), "transforms": [Prune(0.5)]},
    "router of features": lambda: {
        "router": FeatureRouter(hard=True), "learn": ["router"], "objective": TaskIdentity(), "task_id": "inferred",
        "transforms": [Rebase(), TruncatedSVD(0.25)],
    },
    "router that does not learn": lambda: {"router": FeatureRouter(), "learn": ["coefficients"]},
    "surgery": lambda: {
        "correction": Surgery(rank=3),
        "phases": [Phase(Entropy(), ["coefficients"], 0.5), Phase(RepresentationL1(), ["correction"])],
    },
    "surgery of blocks": lambda: {"correction": Surgery(rank=3, blocks=True), "objective": RepresentationL1(True)},
    "task block": lambda: {"correction": TaskBlock(0), "objective": PseudoLabels()},
    "heads": lambda: {"learn": ["coefficients", "heads"], "objective": PseudoLabels()},
}  # fmt: skip


def outputs(module: Adaptation) -> dict[str, torch.Tensor]:
    module.eval()
    images = {task: module.suite.dataset(task, "test").batch(torch.arange(9))[0] for task in module.suite.tasks}
    with torch.no_grad():
        return {task: module.scored(images[task], task) for task in module.suite.tasks}


def fresh(name: str) -> dict:
    """The arguments again, with another random start."""
    torch.manual_seed(99)
    return {"suite": TinySuite(vit=True), **PARTS[name]()}


@pytest.mark.parametrize("how", ["load_from_checkpoint", "restore"])
@pytest.mark.parametrize("name", PARTS)
def test_what_was_learned_comes_back(adapt, tmp_path, name, how):
    torch.manual_seed(1)
    adam = {"optimizer": lambda params: torch.optim.Adam(params, lr=2e-2)}
    module, trainer = adapt(steps=4, suite=TinySuite(vit=True), **PARTS[name](), **adam)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    if how == "restore":
        again = Adaptation(**fresh(name)).restore(tmp_path / "run.ckpt")
    else:
        again = Adaptation.load_from_checkpoint(tmp_path / "run.ckpt", **fresh(name))
    learned = dict(again.learned())
    for key, value in module.learned():
        assert torch.equal(learned[key], value), key
    expected, start = outputs(module), outputs(Adaptation(**fresh(name)))
    for task, logits in outputs(again).items():
        torch.testing.assert_close(logits, expected[task], rtol=0, atol=0)
    assert any(not torch.equal(start[task], logits) for task, logits in expected.items())


def test_every_learned_tensor_is_stored_and_no_other(adapt, tmp_path):
    for name in ("surgery of blocks", "heads", "router of blocks"):
        module, trainer = adapt(steps=1, **fresh(name))
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
        assert list(saved) == [key for key, _ in module.learned()]


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        ("surgery of blocks", {"correction": Surgery(rank=2, blocks=True)}, r"correction\.\S+ is \[.*3.*\] in the"),
        ("surgery of blocks", {"correction": Surgery(rank=3)}, r"differ in \['correction\.inner"),
        ("router of blocks", {"router": BlockRouter(depth=1)}, r"differ in \['router\.gates"),
        ("shared router", {"transforms": [Prune(0.4)]}, "transforms are not those of this run"),
        ("heads", {"learn": ["coefficients"]}, r"differ in \['heads\.one\.weight'"),
    ],
)
def test_other_parts_are_refused(adapt, tmp_path, saved, other, message):
    _, trainer = adapt(steps=1, **fresh(saved))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(InputError, match=message):
        Adaptation(**{**fresh(saved), **other}).restore(tmp_path / "run.ckpt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("surgery", "Surgery is another one for every task: no single backbone"),
        ("task block", "TaskBlock is another one for every task: no single backbone"),
        ("router of blocks", "there is no merge to export"),
    ],
)
def test_what_no_single_backbone_computes_is_not_exported(tmp_path, name, message):
    module = Adaptation(**fresh(name))
    with pytest.raises(InputError, match=message):
        module.export(tmp_path / "merged.safetensors")


@pytest.mark.parametrize("name", ["coefficients", "heads"])
def test_an_export_says_that_it_has_no_heads_where_they_learned(tmp_path, caplog, name):
    caplog.set_level(logging.WARNING, "trainers.adaptation")
    path = Adaptation(**fresh(name)).export(tmp_path / "merged.safetensors")
    assert path.is_file()
    assert ("is the backbone alone" in caplog.text) == (name == "heads")
