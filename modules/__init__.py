"""Learned parts: coefficients, the merged model, heads and objectives."""

from modules.coefficients import Coefficients
from modules.heads import Head, Heads
from modules.merged import MergedModel
from modules.objectives import Entropy, Objective

__all__ = ["Coefficients", "Entropy", "Head", "Heads", "MergedModel", "Objective"]
