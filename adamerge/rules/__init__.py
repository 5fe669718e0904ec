"""Merging rules and transforms of task vectors: one small typed class each."""

from adamerge.rules.aim import Aim
from adamerge.rules.anchor import Rebase
from adamerge.rules.base import Correction, PerTensor, Rule, Stack, Transform, WeightRule, transform
from adamerge.rules.cart import Cart
from adamerge.rules.consensus import Consensus
from adamerge.rules.dare import Dare, Della
from adamerge.rules.doge import Doge
from adamerge.rules.fisher import Fisher
from adamerge.rules.fold import Fold, fold
from adamerge.rules.frank_wolfe import FwMerging
from adamerge.rules.iso import IsoC, IsoCts
from adamerge.rules.knots import Drm, KnOts
from adamerge.rules.linear import Expo, LearnedCoefficients, Linear, Mean, MetaGpt, TaskArithmetic
from adamerge.rules.lines import Lines
from adamerge.rules.lora import CoPa, LoraLego
from adamerge.rules.lore import LoRe
from adamerge.rules.magmax import MagMax
from adamerge.rules.masks import Emr, TallMask
from adamerge.rules.matrices import Matrices
from adamerge.rules.mats import MaTs
from adamerge.rules.merged import Merged
from adamerge.rules.opcm import Opcm
from adamerge.rules.pcb import Pcb
from adamerge.rules.prune import Breadcrumbs, Cabs, Prune
from adamerge.rules.ram import Ram
from adamerge.rules.regmean import RegMean, RegMeanPlusPlus
from adamerge.rules.sce import Sce
from adamerge.rules.sens import SensMerging
from adamerge.rules.signs import ComPeft, OneBit
from adamerge.rules.slerp import Karcher, MultiSlerp, NuSlerp, Slerp
from adamerge.rules.spectral import TruncatedSVD
from adamerge.rules.star import Star
from adamerge.rules.stf import Stf
from adamerge.rules.stock import ModelStock
from adamerge.rules.store import Store
from adamerge.rules.svc import Svc
from adamerge.rules.swap import LayerSwap, NearSwap
from adamerge.rules.ties import ElectSign, Trim
from adamerge.rules.tsv import TsvM
from adamerge.rules.widen import Widen
from adamerge.rules.wudi import Wudi

__all__ = [
    "Aim",
    "Breadcrumbs",
    "Cabs",
    "Cart",
    "ComPeft",
    "Consensus",
    "CoPa",
    "Correction",
    "Dare",
    "Della",
    "Doge",
    "Drm",
    "ElectSign",
    "Emr",
    "Expo",
    "Fisher",
    "Fold",
    "FwMerging",
    "IsoC",
    "IsoCts",
    "Karcher",
    "KnOts",
    "LayerSwap",
    "LearnedCoefficients",
    "Linear",
    "Lines",
    "LoraLego",
    "LoRe",
    "MagMax",
    "Matrices",
    "MaTs",
    "Mean",
    "Merged",
    "MetaGpt",
    "ModelStock",
    "MultiSlerp",
    "NearSwap",
    "NuSlerp",
    "OneBit",
    "Opcm",
    "Pcb",
    "PerTensor",
    "Prune",
    "Ram",
    "Rebase",
    "RegMean",
    "RegMeanPlusPlus",
    "Rule",
    "Sce",
    "SensMerging",
    "Slerp",
    "Stack",
    "Star",
    "Stf",
    "Store",
    "Svc",
    "TallMask",
    "TaskArithmetic",
    "Transform",
    "Trim",
    "TruncatedSVD",
    "TsvM",
    "WeightRule",
    "Widen",
    "Wudi",
    "fold",
    "transform",
]
