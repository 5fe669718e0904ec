"""Runs the YAML files of mergekit: `read("merge.yml")` is a job for `adamerge.merge` and the command line.

Supported are `models` and `slices`, parameters at every level as numbers, gradients over the layers and conditions on
names, and the methods of `adamerge.mergekit.methods`. What is not supported is refused in words; where the result
differs from mergekit's by design, or a key has no effect, the job's notes say so.
"""

from adamerge.mergekit.methods import METHODS, Mergekit
from adamerge.mergekit.reading import read

__all__ = ["METHODS", "Mergekit", "read"]
