"""Layer-wise AdaMerging against a reference implementation: every step's losses, gradients and coefficients."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from adamerge import TaskVectors
from modules import Coefficients, Entropy, MergedModel


class Tower(nn.Module):
    """The reference's features: pooled output, projected by the base's visual projection, of unit length."""

    def __init__(self, config: dict, projection: Tensor) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(CLIPVisionConfig(**config))
        self.projection = projection

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.vision(pixel_values=images).pooler_output @ self.projection.T, dim=-1)


@pytest.fixture
def reference(shared):
    inputs = torch.load(shared / "parity/inputs.pt", weights_only=True)
    return inputs, torch.load(shared / "parity/adamerging_layer_wise.pt", weights_only=True)["fp64"]


def build(inputs) -> tuple[MergedModel, dict[str, Tensor]]:
    def double(state):
        return {f"vision.{name}": value.double() for name, value in state.items()}

    experts = {task: double(state) for task, state in zip(inputs["tasks"], inputs["experts"], strict=True)}
    tower = Tower(inputs["model_config"], inputs["visual_projection"].double()).double()
    model = MergedModel(tower, TaskVectors.from_state_dicts(double(inputs["base"]), experts), Coefficients("tensor"))
    heads = zip(inputs["tasks"], inputs["heads"], strict=True)
    return model, {task: inputs["logit_scale_exp"] * head.double() for task, head in heads}


@pytest.mark.parametrize("micro_batches", [False, True], ids=["one forward", "micro-batches"])
def test_twenty_steps_of_layer_wise_adamerging(reference, micro_batches):
    inputs, expected = reference
    model, heads = build(inputs)
    objective = Entropy(eps=1e-8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    columns = [model.coefficients.groups.index(f"vision.{name}") for name in inputs["param_names"]]

    for step, images in enumerate(inputs["images"].double()):

        def loss(task: str, features: Tensor) -> Tensor:
            return objective(SimpleNamespace(logits=features @ heads[task].T)).mean()

        tasks = list(inputs["tasks"])
        if micro_batches:
            losses = model.in_parts([lambda t=t, x=x: loss(t, model(x)) for t, x in zip(tasks, images, strict=True)])
        else:
            features = model(images.flatten(0, 1)).split(images.shape[1])
            losses = [loss(t, z) for t, z in zip(tasks, features, strict=True)]
        optimizer.zero_grad()
        sum(losses).backward()
        torch.testing.assert_close(torch.stack(losses).detach(), expected["losses"][step].double(), rtol=0, atol=1e-9)
        grads = model.coefficients.raw.grad[columns].T
        torch.testing.assert_close(grads, expected["grads"][step].double(), rtol=0, atol=1e-9)
        optimizer.step()
        learned = model.coefficients().detach()[columns].T
        torch.testing.assert_close(learned, expected["lambdas"][step].double(), rtol=0, atol=1e-9)

    for name, value in model.merged_state_dict().items():
        torch.testing.assert_close(value, expected["merged"][name.removeprefix("vision.")], rtol=0, atol=1e-9)
