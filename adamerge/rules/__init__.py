"""Merging rules and transforms of task vectors: one small typed class each."""

from adamerge.rules.anchor import Rebase
from adamerge.rules.base import Correction, PerTensor, Rule, Stack, Transform, WeightRule, transform
from adamerge.rules.linear import Expo, LearnedCoefficients, Linear, Mean, MetaGpt, TaskArithmetic
from adamerge.rules.prune import Prune
from adamerge.rules.slerp import Karcher, MultiSlerp, NuSlerp, Slerp
from adamerge.rules.spectral import TruncatedSVD
from adamerge.rules.stock import ModelStock
from adamerge.rules.swap import LayerSwap, NearSwap
from adamerge.rules.ties import ElectSign, Trim

__all__ = [
    "Correction",
    "ElectSign",
    "Expo",
    "Karcher",
    "LayerSwap",
    "LearnedCoefficients",
    "Linear",
    "Mean",
    "MetaGpt",
    "ModelStock",
    "MultiSlerp",
    "NearSwap",
    "NuSlerp",
    "PerTensor",
    "Prune",
    "Rebase",
    "Rule",
    "Slerp",
    "Stack",
    "TaskArithmetic",
    "Transform",
    "Trim",
    "TruncatedSVD",
    "WeightRule",
    "transform",
]
