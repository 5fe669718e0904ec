"""Singular vectors of the experts, made orthogonal: written out with LAPACK's decomposition, and its limits."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Matrices, TsvM


def vectors(deltas: Tensor, name: str = "w", base: Tensor | None = None) -> TaskVectors:
    base = torch.zeros_like(deltas[0]) if base is None else base
    return TaskVectors.from_state_dicts({name: base}, {f"t{k}": {name: base + d} for k, d in enumerate(deltas)})


def by_svd(deltas: Tensor) -> Tensor:
    """TSV-M with whitening by singular value decompositions, expert by expert."""
    rank = min(deltas.shape[1:]) // len(deltas)
    lefts, values, rights = [], [], []
    for delta in deltas:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        lefts, values, rights = [*lefts, u[:, :rank]], [*values, s[:rank]], [*rights, v[:rank]]
    p, _, q = torch.linalg.svd(torch.cat(lefts, 1), full_matrices=False)
    a, _, b = torch.linalg.svd(torch.cat(rights), full_matrices=False)
    return (p @ q) @ torch.diag(torch.cat(values)) @ (a @ b)


@pytest.mark.parametrize("shape", [(3, 12, 20), (3, 20, 12), (4, 9, 9)])
def test_the_merge_is_that_of_the_paper(shape):
    deltas = torch.randn(shape, dtype=torch.float64)
    assert_close(merge(vectors(deltas), [TsvM()])["w"], by_svd(deltas), rtol=0, atol=1e-11)


def test_the_nuclear_norm_is_that_of_what_is_kept():
    deltas = torch.randn(3, 12, 20, dtype=torch.float64)
    kept = sum(torch.linalg.svdvals(delta)[:4].sum() for delta in deltas)
    assert_close(torch.linalg.svdvals(merge(vectors(deltas), [TsvM()])["w"]).sum(), kept)


@pytest.mark.parametrize("shape", [(8, 8), (5, 11), (7, 1), (1, 7)])
@pytest.mark.parametrize("count", [2, 4, 13])
def test_experts_that_coincide_give_their_leading_directions_and_no_others(shape, count):
    delta = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    rank = max(1, len(s) // count)
    merged = merge(vectors(delta.expand(count, *shape)), [TsvM()])["w"]
    assert_close(merged, (u * s)[:, :rank] @ v[:rank], rtol=0, atol=1e-12)
    opposite = merge(vectors(torch.stack([delta, -delta])), [TsvM()])["w"]
    assert_close(opposite, torch.zeros_like(delta), rtol=0, atol=1e-12)


def test_rounding_is_no_direction():
    """Experts of rank 1 in float32, at weights a thousand times as large, are whitened as in float64."""
    base = torch.randn(40, 40)
    deltas = torch.stack([torch.outer(torch.randn(40), torch.randn(40).double()) for _ in range(2)]) / 1000
    merged = merge(vectors(deltas.float(), base=base), [TsvM()])["w"] - base
    exact = merge(vectors(deltas), [TsvM()])["w"].float()
    assert_close(merged, exact, rtol=0, atol=2e-6)
    assert exact.abs().max() > 1e-3


def test_experts_that_all_but_coincide_are_no_directions_of_their_own():
    delta = torch.randn(8, 8, dtype=torch.float64)
    near = delta + 1e-6 * torch.randn(3, 8, 8, dtype=torch.float64)
    same, merged = (merge(vectors(deltas), [TsvM()])["w"] for deltas in (delta.expand(3, 8, 8), near))
    assert_close(merged, same, rtol=0, atol=1e-4)


def test_experts_with_heavier_tails_weigh_more():
    """Weights by hand: means of |Δ| and their spread by loops over entries."""
    torch.manual_seed(0)
    deltas = torch.randn(3, 12, 20, dtype=torch.float64)
    deltas[1, 2, 3], deltas[2, 4, 5], deltas[2, 6, 7] = 9.0, -12.0, 14.0
    sums = []
    for delta in deltas:
        sizes = [abs(x) for row in delta.tolist() for x in row]
        mean = sum(sizes) / len(sizes)
        spread = (sum((size - mean) ** 2 for size in sizes) / len(sizes)) ** 0.5
        sums.append(sum(size for size in sizes if size > mean + 4 * spread))
    assert sums == pytest.approx([0, 9, 26])
    weighted = merge(vectors(deltas), [TsvM(outliers=4.0)])["w"]
    kept = [3 * w / 35 * torch.linalg.svdvals(d)[:4].sum() for w, d in zip(sums, deltas, strict=True)]
    assert_close(torch.linalg.svdvals(weighted).sum(), sum(kept))
    # With the same tails, and with none at all, nothing changes.
    same = torch.stack([deltas[2], deltas[2].flip(0), deltas[2].flip(1)])
    for experts, threshold in ((same, 4.0), (deltas, 50.0)):
        plain, other = (merge(vectors(experts), [TsvM(outliers=given)])["w"] for given in (None, threshold))
        assert_close(other, plain, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="outliers > 0"):
        TsvM(outliers=0.0)


def test_what_is_no_matrix_is_averaged():
    conv = torch.randn(3, 6, 2, 3, dtype=torch.float64)
    for name, deltas, matrices in (
        ("conv.weight", conv, Matrices()),
        ("bias", torch.randn(3, 5, dtype=torch.float64), Matrices(convolutions=True)),
        ("tokens.embed.weight", torch.randn(3, 5, 6, dtype=torch.float64), Matrices(average="embed")),
    ):
        assert_close(merge(vectors(deltas, name), [TsvM(matrices)], scale=2.0)[name], 2 * deltas.mean(0))
    seen = merge(vectors(conv), [TsvM(Matrices(convolutions=True))])["w"]
    assert_close(seen, merge(vectors(conv.flatten(2)), [TsvM()])["w"].view_as(seen))


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"average='\(' in Matrices is no regular expression"):
        Matrices(average="(")
