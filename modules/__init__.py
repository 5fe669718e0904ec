"""Learned parts: coefficients, routers, corrections, heads; the merged model that they change; objectives."""

from modules.blocks import Blocks, LoneBlocks
from modules.coefficients import Coefficients
from modules.corrections import Correction, Surgery, TaskBlock
from modules.elements import ConcreteMask, Elements, Residual
from modules.fuser import Fuser
from modules.given import GivenTask
from modules.heads import Head, Heads
from modules.merged import MergedModel
from modules.objectives import (
    Divergence,
    Diversity,
    DualAnchors,
    Entropy,
    Mistakes,
    Objective,
    PseudoLabels,
    RepresentationL1,
    Sum,
    Supervised,
    TaskIdentity,
)
from modules.routers import BlockRouter, FeatureRouter, Router
from modules.views import Pass, View

__all__ = [
    "BlockRouter",
    "Blocks",
    "Coefficients",
    "ConcreteMask",
    "Correction",
    "Divergence",
    "Diversity",
    "DualAnchors",
    "Elements",
    "Entropy",
    "FeatureRouter",
    "Fuser",
    "GivenTask",
    "Head",
    "Heads",
    "LoneBlocks",
    "MergedModel",
    "Mistakes",
    "Objective",
    "Pass",
    "PseudoLabels",
    "RepresentationL1",
    "Residual",
    "Router",
    "Sum",
    "Supervised",
    "Surgery",
    "TaskBlock",
    "TaskIdentity",
    "View",
]
