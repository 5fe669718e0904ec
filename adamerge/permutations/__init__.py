"""Networks trained from different initialisations, brought into one order of units: a step before task vectors.

symmetry = chain(model_a.state_dict())                        # or symmetry_of(…) for a ResNet or ViT
order = match_weights(model_a.state_dict(), model_b.state_dict(), symmetry)
aligned = apply(model_b.state_dict(), symmetry, order)        # the same function as model_b, near model_a

From there on, merge as usual, or by `least_squares`; `zip_units` joins units of networks for different tasks instead.
"""

from adamerge.permutations.activations import match_activations, recalibrate, transport
from adamerge.permutations.least_squares import least_squares
from adamerge.permutations.symmetries import FAMILIES, Axis, Symmetry, chain, symmetry_of
from adamerge.permutations.weights import apply, match_weights
from adamerge.permutations.zipping import Zipped, zip_units

__all__ = [
    "FAMILIES",
    "Axis",
    "Symmetry",
    "Zipped",
    "apply",
    "chain",
    "least_squares",
    "match_activations",
    "match_weights",
    "recalibrate",
    "symmetry_of",
    "transport",
    "zip_units",
]
