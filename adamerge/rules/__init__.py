"""Merging rules and transforms of task vectors: one small typed class each."""

from adamerge.rules.anchor import Rebase
from adamerge.rules.base import Correction, PerTensor, Rule, Stack, Transform, WeightRule, transform
from adamerge.rules.consensus import Consensus
from adamerge.rules.dare import Dare, Della
from adamerge.rules.fisher import Fisher
from adamerge.rules.fold import Fold, fold
from adamerge.rules.linear import Expo, LearnedCoefficients, Linear, Mean, MetaGpt, TaskArithmetic
from adamerge.rules.lines import Lines
from adamerge.rules.magmax import MagMax
from adamerge.rules.masks import Emr, TallMask
from adamerge.rules.merged import Merged
from adamerge.rules.pcb import Pcb
from adamerge.rules.prune import Breadcrumbs, Cabs, Prune
from adamerge.rules.ram import Ram
from adamerge.rules.regmean import RegMean
from adamerge.rules.sce import Sce
from adamerge.rules.signs import ComPeft, OneBit
from adamerge.rules.slerp import Karcher, MultiSlerp, NuSlerp, Slerp
from adamerge.rules.spectral import TruncatedSVD
from adamerge.rules.stock import ModelStock
from adamerge.rules.swap import LayerSwap, NearSwap
from adamerge.rules.ties import ElectSign, Trim
from adamerge.rules.widen import Widen

__all__ = [
    "Breadcrumbs",
    "Cabs",
    "ComPeft",
    "Consensus",
    "Correction",
    "Dare",
    "Della",
    "ElectSign",
    "Emr",
    "Expo",
    "Fisher",
    "Fold",
    "Karcher",
    "LayerSwap",
    "LearnedCoefficients",
    "Linear",
    "Lines",
    "MagMax",
    "Mean",
    "Merged",
    "MetaGpt",
    "ModelStock",
    "MultiSlerp",
    "NearSwap",
    "NuSlerp",
    "OneBit",
    "Pcb",
    "PerTensor",
    "Prune",
    "Ram",
    "Rebase",
    "RegMean",
    "Rule",
    "Sce",
    "Slerp",
    "Stack",
    "TallMask",
    "TaskArithmetic",
    "Transform",
    "Trim",
    "TruncatedSVD",
    "WeightRule",
    "Widen",
    "fold",
    "transform",
]
