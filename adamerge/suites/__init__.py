"""Suites: the pools of models and tasks that one adapts on."""

from adamerge.suites.base import FineTune, HeadWeights, Split, Suite
from adamerge.suites.clip import ClipVision
from adamerge.suites.local import Local
from adamerge.suites.mini import Mini
from adamerge.suites.subset import Subset

__all__ = ["ClipVision", "FineTune", "HeadWeights", "Local", "Mini", "Split", "Subset", "Suite"]
