"""The small CLIP vision model of the reference numbers, in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from adamerge import TaskVectors


class Tower(nn.Module):
    """The reference's features: pooled output, projected by the base's visual projection, of unit length."""

    def __init__(self, config: dict, projection: Tensor) -> None:
        super().__init__()
        self.vision = CLIPVisionModel(CLIPVisionConfig(**config))
        self.projection = projection

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.vision(pixel_values=images).pooler_output @ self.projection.T, dim=-1)


@pytest.fixture
def small_clip(shared) -> SimpleNamespace:
    """The architecture, its task vectors, and by task the heads' weights; images [steps, tasks, B, 3, 32, 32]."""
    inputs = torch.load(shared / "parity/inputs.pt", weights_only=True)

    def double(state):
        return {f"vision.{name}": value.double() for name, value in state.items()}

    experts = {task: double(state) for task, state in zip(inputs["tasks"], inputs["experts"], strict=True)}
    heads = zip(inputs["tasks"], inputs["heads"], strict=True)
    return SimpleNamespace(
        tower=Tower(inputs["model_config"], inputs["visual_projection"].double()).double(),
        vectors=TaskVectors.from_state_dicts(double(inputs["base"]), experts),
        experts=experts,
        tasks=tuple(inputs["tasks"]),
        heads={task: inputs["logit_scale_exp"] * head.double() for task, head in heads},
        images=inputs["images"].double(),
        param_names=inputs["param_names"],
    )
