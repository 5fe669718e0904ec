"""Adapting on dual anchors: without images, towards the expert, and with anchors that are made once."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_suite import TinySuite
from torch.func import functional_call
from torch.testing import assert_close

from adamerge import InputError
from adamerge.files import cache_folder
from adamerge.objectives import entropy
from modules import Coefficients, DualAnchors, Entropy, LoneBlocks, Residual, Sum
from trainers import Adaptation, Stream
from trainers.anchors import anchor_rows
from trainers.report import information

FEW = {"count": 4, "steps": 5}


def fda(adapt, steps=3, objective=None, learn="elements", **kwargs):
    torch.manual_seed(0)
    objective = objective or DualAnchors(**FEW)
    settings = {"suite": TinySuite(vit=True), "elements": Residual(), "learn": [learn], "objective": objective}
    module, _ = adapt(steps, **(settings | kwargs))
    return torch.cat([p.detach().flatten() for _, p in module.learned()]), module


def total(module) -> float:
    """The distance that is minimised."""
    value = 0.0
    for _, rows in anchor_rows(module, module.phases[0].objective):
        for name, x, y in zip(module.merged.alone.shapes, rows[::2], rows[1::2], strict=True):
            out = module.merged.alone(name, module.merged.merged_state_dict(), x).flatten(1)
            value += float((1 - torch.cosine_similarity(out, y.flatten(1))).mean())
    return value


def test_a_block_alone_is_that_block_in_the_model():
    suite = TinySuite(vit=True)
    model, vectors = suite.backbone().eval(), suite.task_vectors()
    alone = LoneBlocks(model, torch.zeros(1, 3, 8, 8))
    assert alone.shapes == {"blocks.0": (4, 8), "blocks.1": (4, 8)}
    seen = []
    hooks = [b.register_forward_hook(lambda m, x, y: seen.append((x[0], y))) for b in model.blocks]
    expert = vectors.expert("two")
    functional_call(model, expert, (torch.randn(2, 3, 8, 8),))
    [hook.remove() for hook in hooks]
    for name, (x, y) in zip(alone.shapes, seen, strict=True):
        assert_close(alone(name, expert, x), y, rtol=0, atol=0)


def test_the_distance_to_the_experts_falls_without_images(adapt, monkeypatch):
    monkeypatch.setattr("trainers.streams.fetch", None)  # no image is loaded
    adam = partial(torch.optim.Adam, lr=1e-2)
    start = Adaptation(TinySuite(vit=True), objective=DualAnchors(**FEW))
    _, module = fda(adapt, 20, optimizer=adam)
    assert total(module) < 0.8 * total(start)
    assert information(module, Stream()) == {"anchors"}


def test_a_step_is_one_on_the_summed_distances(adapt):
    start = Adaptation(TinySuite(vit=True), Coefficients("tensor"), objective=DualAnchors(**FEW))
    first = total(start)
    values, module = fda(adapt, 1, learn="coefficients", optimizer=partial(torch.optim.SGD, lr=0.0))
    assert_close(float(module.trainer.callback_metrics["loss"]), first)
    parts, _ = fda(adapt, 3, learn="coefficients", micro_batches=True)
    whole, _ = fda(adapt, 3, learn="coefficients")
    assert_close(parts, whole, rtol=0, atol=1e-6)
    assert not torch.equal(whole, values)


def test_a_model_that_is_one_expert_has_no_distance_to_it(adapt):
    one = Coefficients("tensor", init=[0.0, 1.0, 0.0])
    _, module = fda(adapt, 1, coefficients=one, optimizer=partial(torch.optim.SGD, lr=0.0))
    metrics = module.trainer.callback_metrics
    assert_close(float(metrics["loss/two"]), 0.0, rtol=0, atol=1e-5)
    assert metrics["loss/one"] > 1e-3


def test_anchors_are_made_once_and_depend_on_settings(adapt, monkeypatch, tmp_path):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))
    fda(adapt)
    files = {path: path.stat().st_mtime_ns for path in (cache_folder() / "anchors").iterdir()}
    assert len(files) == 3
    fda(adapt)
    assert {path: path.stat().st_mtime_ns for path in (cache_folder() / "anchors").iterdir()} == files
    fda(adapt, objective=DualAnchors(count=4, steps=5, seed=1))
    assert len(list((cache_folder() / "anchors").iterdir())) == 6


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_goes_on_bit_for_bit(adapt, tmp_path):
    whole, _ = fda(adapt, 5)
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    fda(adapt, 3, callbacks=[keep])
    resumed, module = fda(adapt, 5, callbacks=[keep], ckpt_path=str(tmp_path / "last.ckpt"))
    assert module.trainer.global_step == 5
    assert torch.equal(whole, resumed)


def test_it_adds_to_objectives_of_images(adapt):
    """The sum takes images again, of any number."""
    both = Sum([DualAnchors(**FEW), Entropy()])
    _, module = fda(adapt, 1, objective=both, optimizer=partial(torch.optim.SGD, lr=0.0))
    suite = module.suite
    images = {task: part["images"] for task, part in module.trainer.train_dataloader.items[0].items()}
    with torch.no_grad():
        expected = sum(entropy(module(x, task)).mean() for task, x in images.items())
    start = Adaptation(suite, objective=DualAnchors(**FEW))
    assert_close(float(module.trainer.callback_metrics["loss"]), float(expected) + total(start), rtol=1e-4, atol=1e-5)
    assert information(module, Stream()) == {"anchors", "images", "task id"}


def test_refusals(adapt):
    with pytest.raises(InputError, match="must be positive, got 0, 1200"):
        DualAnchors(count=0)
    with pytest.raises(InputError, match="heads cannot learn from DualAnchors"):
        fda(adapt, learn="heads")
    with pytest.raises(InputError, match="has no stack of blocks"):
        fda(adapt, suite=TinySuite())
