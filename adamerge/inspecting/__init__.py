"""A look into experts before they are merged: how they lie to each other, where they fight, what is worth trying."""

from adamerge.inspecting.geometry import Geometry, measure
from adamerge.inspecting.spectra import Spectrum, decompose, decompose_all
from adamerge.inspecting.verdict import Finding, findings

__all__ = ["Finding", "Geometry", "Spectrum", "decompose", "decompose_all", "findings", "measure"]
