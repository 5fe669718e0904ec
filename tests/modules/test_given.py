"""Tasks that are given: every image through its own expert."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from adamerge import InputError, TaskVectors
from adamerge.backbones import TinyViT
from adamerge.rules import Emr, transform
from modules import Coefficients, Fuser, GivenTask, MergedModel, Pass

DIM, TASKS = 8, ("a", "b", "c")


@pytest.fixture
def model() -> nn.Module:
    return TinyViT(image_size=16, patch=8, dim=DIM, depth=2, heads=2).double().eval()


@pytest.fixture
def vectors(model: nn.Module) -> TaskVectors:
    base = model.state_dict()
    experts = {task: {n: v + 0.1 * torch.randn_like(v) for n, v in base.items()} for task in TASKS}
    return transform(TaskVectors.from_state_dicts(base, experts), [Emr()])


@pytest.fixture
def merged(model, vectors) -> MergedModel:
    return MergedModel(model, vectors, Coefficients("model"), GivenTask(), DIM).eval()


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16).double()


def test_every_image_goes_through_the_expert_of_its_task(model, vectors, merged):
    batch = {"c": images(2), "a": images(3)}
    outputs = Pass(merged, batch).outputs
    for task, part in batch.items():
        assert_close(outputs[task][0], functional_call(model, vectors.expert(task), part).detach())
    assert merged.segments == {}


def test_coefficients_change_nothing(merged):
    batch = {"b": images(2)}
    before = Pass(merged, batch).outputs["b"][0]
    merged.coefficients.raw.data += 1
    assert torch.equal(Pass(merged, batch).outputs["b"][0], before)


def test_a_task_has_to_be_given_and_to_have_an_expert(merged):
    with pytest.raises(InputError, match="a batch of 2 is taken task by task, but nothing says of which tasks"):
        merged(images(2))
    with pytest.raises(InputError, match="task 'd' has no expert of its own among a, b, c"):
        Pass(merged, {"d": images(1)}).outputs  # noqa: B018


def test_corrections_inside_see_the_task_of_each_part(merged):
    seen: list[tuple[str, int]] = []

    def note(x: Tensor, block: str, task: str) -> Tensor:
        seen.append((task, len(x)))
        return x

    merged.blocks.correct = note
    Pass(merged, {"a": images(1), "b": images(2)}).outputs  # noqa: B018
    assert seen == [("a", 1)] * 2 + [("b", 2)] * 2


def test_there_is_no_merge_to_export_and_every_bit_is_kept(model, vectors, merged):
    with pytest.raises(InputError, match="a model that routes"):
        merged.materialise()
    numbers = sum(p.numel() for p in model.parameters())
    kept = sum(delta.nbytes // 8 for delta in vectors.deltas.values())  # in numbers of float64
    assert merged.stored_parameters() == numbers + kept
    assert kept < 1.2 * numbers
    fused = MergedModel(model, vectors, Coefficients("model"), Fuser(), DIM)
    assert fused.stored_parameters() == numbers + kept
