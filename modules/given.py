"""Where the task of an image is known, and its expert computes it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adamerge import InputError
from adamerge.deltas import AnyDeltas
from modules.routers import Router
from modules.structure import Site


class GivenTask(Router):
    """Every image goes through the expert of its task, which has to be given with it: w is one-hot.

    For transforms that give one model per task from few bits (`adamerge.rules.Emr`, `TallMask`, ...), and the reference
    for what a router that has to find the task can reach. Nothing is merged, and the coefficients change nothing;
    running statistics are the experts' mean.
    """

    mixes = "tasks"

    def find(self, model: nn.Module, deltas: Mapping[str, AnyDeltas]) -> list[Site]:
        return []

    def build(self, sites: Sequence[Site], features: int, dtype: torch.dtype) -> None:
        """There is nothing to learn."""

    def forward(self, x: Tensor, site: str) -> Tensor:
        raise InputError("GivenTask is told the task of an image, and cannot find it: give it with the images")
