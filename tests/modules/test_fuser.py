"""Fusion of experts: mixed outputs equal the experts where one of them has all the weight."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from adamerge import InputError, TaskVectors
from adamerge.backbones import TinyViT
from adamerge.rules import TruncatedSVD, transform
from modules import Coefficients, Fuser, MergedModel, Pass

DIM, TASKS = 8, ("a", "b", "c")


@pytest.fixture
def model() -> nn.Module:
    return TinyViT(image_size=16, patch=8, dim=DIM, depth=2, heads=2).double().eval()


@pytest.fixture
def vectors(model: nn.Module) -> TaskVectors:
    base = model.state_dict()
    experts = {task: {n: v + 0.1 * torch.randn_like(v) for n, v in base.items()} for task in TASKS}
    return TaskVectors.from_state_dicts(base, experts)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 16, 16).double()


def outputs(model: nn.Module, vectors: TaskVectors, images: Tensor) -> Tensor:
    """[B, K, D] of plain models with the experts' weights."""
    return torch.stack([functional_call(model, vectors.expert(task), images).detach() for task in vectors.tasks], 1)


def fuser(model: nn.Module, vectors: TaskVectors, **kwargs) -> MergedModel:
    return MergedModel(model, vectors, Coefficients("model"), Fuser(**kwargs), DIM).eval()


def decide(merged: MergedModel, logits: list[float]) -> None:
    """Let the fuser say the same of every image."""
    last = merged.router.classifier[-1]
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor(logits, dtype=last.bias.dtype)


def test_it_looks_at_the_features_of_every_expert(model, vectors, images):
    merged = fuser(model, vectors)
    assert_close(merged.shared(images), outputs(model, vectors, images).flatten(1))
    assert merged.router.logits(merged.shared(images)).shape == (5, 3)


def test_all_weight_on_one_expert_is_that_expert(model, vectors, images):
    merged = fuser(model, vectors)
    decide(merged, [0.0, 1000.0, 0.0])
    assert_close(merged(images), outputs(model, vectors, images)[:, 1])


def test_equal_weights_are_the_ensembles_mean(model, vectors, images):
    merged = fuser(model, vectors, hard=False)
    decide(merged, [0.0, 0.0, 0.0])
    mean = outputs(model, vectors, images).mean(1)
    assert_close(merged(images), mean)
    assert (merged(images) - MergedModel(model, vectors, Coefficients(init=1 / 3))(images)).abs().max() > 1e-6


def test_hard_takes_the_likeliest_expert_in_evaluation_alone(model, vectors, images):
    merged = fuser(model, vectors, hard=True, dropout=0.0)
    decide(merged, [0.1, 0.0, 0.0])
    assert_close(merged(images), outputs(model, vectors, images)[:, 0])
    merged.train()
    assert not torch.allclose(merged(images), outputs(model, vectors, images)[:, 0])


def test_a_pass_asks_every_expert_once(model, vectors, images, monkeypatch):
    merged = fuser(model, vectors)
    seen: list[int] = []
    original = MergedModel._expert
    monkeypatch.setattr(MergedModel, "_expert", lambda self, k, x: seen.append(len(x)) or original(self, k, x))
    passed = Pass(merged, {"a": images[:2], "c": images[2:]})
    assert passed.shared["c"][0].shape == (3, 3 * DIM)
    assert seen == [5, 5, 5]
    features = torch.cat([passed.outputs["a"][0], passed.outputs["c"][0]])
    assert seen == [5, 5, 5]
    assert_close(features, merged(images))


def test_the_fuser_alone_takes_a_gradient(model, vectors, images):
    merged = fuser(model, vectors)
    merged(images).square().sum().backward()
    assert merged.coefficients.raw.grad is None
    assert all(p.grad is not None for p in merged.router.parameters())


def test_it_stores_every_expert_in_the_form_of_its_task_vector(model, vectors, images):
    size = sum(p.numel() for p in model.parameters())
    assert fuser(model, vectors).stored_parameters() == 4 * size
    small = transform(vectors, [TruncatedSVD(rank=1)])
    merged = fuser(model, small)
    assert merged.stored_parameters() < 4 * size
    assert_close(merged.shared(images), outputs(model, small, images).flatten(1))


def test_a_fuser_belongs_to_one_model(model, vectors):
    used = Fuser()
    MergedModel(model, vectors, Coefficients(), used, DIM)
    with pytest.raises(InputError, match="belongs to another merged model"):
        MergedModel(model, vectors, Coefficients(), used, DIM)
