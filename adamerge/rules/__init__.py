"""Merging rules and transforms of task vectors: one small typed class each."""

from adamerge.rules.anchor import Rebase
from adamerge.rules.base import Correction, PerTensor, Rule, Stack, Transform, WeightRule, transform
from adamerge.rules.linear import LearnedCoefficients, Mean, TaskArithmetic
from adamerge.rules.prune import Prune
from adamerge.rules.spectral import TruncatedSVD
from adamerge.rules.ties import ElectSign, Trim

__all__ = [
    "Correction",
    "ElectSign",
    "LearnedCoefficients",
    "Mean",
    "PerTensor",
    "Prune",
    "Rebase",
    "Rule",
    "Stack",
    "TaskArithmetic",
    "Transform",
    "Trim",
    "TruncatedSVD",
    "WeightRule",
    "transform",
]
