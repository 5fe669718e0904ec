"""Merging rules: one small typed class each."""

from adamerge.rules.base import Rule
from adamerge.rules.linear import LearnedCoefficients, Mean, TaskArithmetic

__all__ = ["LearnedCoefficients", "Mean", "Rule", "TaskArithmetic"]
