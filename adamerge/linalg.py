"""Decompositions of matrices in float64, by the Gram matrix of the smaller side: several times faster than an SVD.

A Gram matrix squares the condition number: singular values below 10⁻⁷ of the largest are lost in it, and count as 0.
All functions take batches of matrices, which a GPU decomposes at once.
"""

import warnings

import torch
from torch import Tensor

from adamerge.errors import InputError

#: Relative to the largest singular value: below it, a Gram matrix in float64 tells nothing.
RESOLUTION = 1e-7

#: Relative to the largest singular value: where all are above it, (ΔᵀΔ)^-½ alone is exact to 10⁻¹⁰.
WELL_CONDITIONED = 2e-3

#: Below this singular value of unit vectors side by side, some coincide: a polar factor would make up other directions.
COINCIDE = 1e-3


def leading(matrix: Tensor, rank: int, name: str, least: Tensor | float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values, with their vectors: U [..., m, rank], σ [..., rank], Vᵀ [..., rank, n].

    Where σ is not above `least`, σ and both vectors are 0. Raises InputError, which names the tensor, where nothing
    converges.
    """
    if matrix.shape[-2] < matrix.shape[-1]:
        right, values, left = leading(matrix.mT, rank, name, least)
        return left.mT, values, right.mT
    matrix = matrix.double()
    vectors = right_vectors(matrix, name)[1][..., :rank]
    left, values = _left_vectors(matrix, vectors, least)
    return left, values, torch.where(values.unsqueeze(-1) > 0, vectors.mT, 0)


def polar(matrix: Tensor, name: str, least: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The nearest matrix with orthonormal columns or rows, U Vᵀ of Δ = U Σ Vᵀ, and σ, by Δ (ΔᵀΔ)^-½.

    Directions in which σ is not above `least` are left out (σ = 0) instead of filled with arbitrary ones.
    """
    if matrix.shape[-2] < matrix.shape[-1]:
        factor, values = polar(matrix.mT, name, least)
        return factor.mT, values
    matrix = matrix.double()
    rough, vectors = right_vectors(matrix, name)
    bound = torch.maximum(WELL_CONDITIONED * rough[..., 0], torch.as_tensor(least).to(rough))
    if bool((rough[..., -1] > bound).all()):
        return matrix @ ((vectors / rough.unsqueeze(-2)) @ vectors.mT), rough
    left, values = _left_vectors(matrix, vectors, least)
    # U is orthonormal up to the Gram matrix's rounding, UᵀU = I + E. To first order in E, the polar factor of
    # U Σ Vᵀ is U (I − E ∘ C) Vᵀ with Cᵢⱼ = σᵢ / (σᵢ + σⱼ), which leaves the square of that rounding.
    sums = values.unsqueeze(-1) + values.unsqueeze(-2)
    share = values.unsqueeze(-1) / torch.where(sums > 0, sums, 1)
    overlap = left.mT @ left
    overlap.diagonal(dim1=-2, dim2=-1).zero_()
    return left @ (vectors.mT - (overlap * share) @ vectors.mT), values


def right_vectors(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """σ [..., n], falling, and V [..., n, n] of tall matrices [..., m, n] in float64; small σ are lost in rounding."""
    try:
        squares, vectors = torch.linalg.eigh(matrix.mT @ matrix)
        return squares.flip(-1).clamp(min=0).sqrt(), vectors.flip(-1)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        message = f"{name}: no eigendecomposition of its Gram matrix was found, a slower singular value one is tried"
        warnings.warn(message, stacklevel=4)
    try:
        _, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return values, right.mT
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise InputError(f"{name} has no singular value decomposition here; leave it out: {error}") from error


def _left_vectors(matrix: Tensor, right: Tensor, least: Tensor | float) -> tuple[Tensor, Tensor]:
    """U [..., m, r] and σ [..., r] that belong to V [..., n, r]."""
    scaled = matrix @ right
    values = torch.linalg.vector_norm(scaled, dim=-2)
    kept = (values > least) & (values > RESOLUTION * values[..., :1])
    values = torch.where(kept, values, 0)
    return torch.where(kept.unsqueeze(-2), scaled / torch.where(kept, values, 1).unsqueeze(-2), 0), values
