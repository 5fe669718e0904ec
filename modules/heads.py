"""Classifier heads on top of the merged features."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamerge import InputError
from adamerge.suites import HeadWeights


class Head(nn.Module):
    """logits = scale · z Wᵀ + b with z [B, D] the feature, scaled to unit length where the head asks for it.

    Frozen: its tensors are parameters that take no gradient, so that a method may choose to train them.
    """

    def __init__(self, weights: HeadWeights) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights.weight.clone(), requires_grad=False)
        self.bias = None if weights.bias is None else nn.Parameter(weights.bias.clone(), requires_grad=False)
        self.normalize, self.scale = weights.normalize, weights.scale

    def forward(self, features: Tensor) -> Tensor:
        if self.normalize:
            features = F.normalize(features, dim=-1)
        return self.scale * F.linear(features, self.weight, self.bias)

    def weights(self) -> HeadWeights:
        """The head as plain tensors."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return HeadWeights(self.weight.detach().clone(), bias, self.normalize, self.scale)

    @classmethod
    def linear(cls, features: int, classes: int) -> "Head":
        """A head to be trained: zero bias, small random weights."""
        weight = torch.empty(classes, features)
        nn.init.trunc_normal_(weight, std=features**-0.5)
        head = cls(HeadWeights(weight, torch.zeros(classes)))
        return head.requires_grad_(True)


class Heads(nn.ModuleDict):
    """One head per task, by task name."""

    def __getitem__(self, key: str) -> Head:
        return cast(Head, super().__getitem__(key))

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if "." in name or (name not in self._modules and hasattr(self, name)):
            raise InputError(f"{name!r} cannot be a task's name: it has a dot, or torch uses it; rename the task")
        super().add_module(name, module)
