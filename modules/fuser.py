"""Ensembles of all experts, the reference for what merging saves."""

from collections.abc import Mapping

from torch import nn

from adamerge.deltas import AnyDeltas
from modules.routers import FeatureRouter
from modules.structure import Site


class Fuser(FeatureRouter):
    """Fusion of experts (FoE, arXiv:2310.01542): an ensemble, the reference for what merging saves.

    The features of all experts, z = [z₁, ..., z_K], say how much each of them counts: Σₖ wₖ zₖ, w = softmax(MLP(z)).
    Nothing is merged. It takes K forward passes per image and keeps every expert. The MLP is KD → 2D → ... → K.

    Args:
        layers: hidden layers, each of width 2D.
        dropout: probability while training.
        hard: evaluate with the most likely expert alone.
    """

    mixes = "outputs"

    def __init__(self, layers: int = 1, dropout: float = 0.5, hard: bool = False) -> None:
        super().__init__(layers, dropout, hard)

    def find(self, model: nn.Module, deltas: Mapping[str, AnyDeltas]) -> list[Site]:
        return []

    def expert_axes(self) -> dict[str, tuple[int, ...]]:
        outputs, first = super().expert_axes(), "classifier.1.weight"
        norm = {"classifier.0.weight": (0,), "classifier.0.bias": (0,)}
        return {**outputs, **norm, first: (*outputs.get(first, ()), 1)}
