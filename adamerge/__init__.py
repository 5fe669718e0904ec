"""Adaptive model merging: task vectors, rules and checkpoints. Tensors in, tensors out."""

from adamerge.coefficients import CoefficientTable, read_coefficients, write_coefficients
from adamerge.compressed import open_compressed, save_compressed
from adamerge.errors import InputError
from adamerge.merge import merge
from adamerge.rules import fold
from adamerge.task_vectors import TaskVectors

__all__ = [
    "CoefficientTable",
    "InputError",
    "TaskVectors",
    "fold",
    "merge",
    "open_compressed",
    "read_coefficients",
    "save_compressed",
    "write_coefficients",
]
__version__ = "0.1.0"
