"""Factors by depth, in the names of common architectures."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Consensus, ElectSign, Lines, TaskArithmetic, Trim
from adamerge.rules.base import Changes, Stack
from adamerge.rules.lines import relative_depths, shallow_scale

NAMES = ("embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "layers.2.b", "head.weight")


@pytest.fixture
def tv() -> TaskVectors:
    base = {name: torch.zeros(4, dtype=torch.float64) for name in NAMES}
    rng = torch.Generator().manual_seed(0)
    experts = {t: {n: torch.randn(4, generator=rng, dtype=torch.float64) for n in NAMES} for t in "abcde"}
    return TaskVectors.from_state_dicts(base, experts)


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (["encoder.layers.0.w", "encoder.layers.1.w", "encoder.layers.4.w", "norm.w"], [0, 1 / 2, 1, 0]),
        (["transformer.resblocks.2.w", "transformer.resblocks.10.w", "transformer.resblocks.1.w"], [1 / 2, 1, 0]),
        (["vision.layers.0.w", "vision.layers.1.w", "text.layers.0.w", "text.layers.1.w", "text.layers.2.w"],
         [0, 1, 0, 1 / 2, 1]),
        (["conv1.weight", "layer1.0.w", "layer1.1.w", "layer2.0.w", "layer2.1.downsample.0.w", "layer10.0.w", "fc.w"],
         [0, 0, 1 / 4, 2 / 4, 3 / 4, 1, 0]),
        (["encoder.block.0.layer.1.w", "encoder.block.1.layer.0.w", "decoder.block.0.layer.2.w"], [0, 1, 0]),
        (["blocks.0.fc.3.w", "blocks.1.fc.0.w"], [0, 1]),
        (["0.weight", "2.weight", "4.weight"], [0, 1 / 2, 1]),
        (["conv2d.weight", "logit_scale", "prompts.3"], [0, 0, 0]),
    ],
    ids=["layers", "order", "towers", "stages", "T5", "nested", "sequential", "none"],
)  # fmt: skip
def test_depths(names, depths):
    assert relative_depths(names) == dict(zip(names, map(float, depths), strict=True))


def test_factors_grow_with_depth(tv):
    merged = merge(tv, rules=[TaskArithmetic(), Lines(alpha=0.25, beta=0.5)])
    for name, factor in zip(NAMES, (0.25, 0.25, 0.5, 0.75, 0.75, 0.25), strict=True):
        assert torch.equal(merged[name], factor * tv.deltas[name].sum(0))


def test_no_growth_is_a_scale(tv):
    merged, scaled = merge(tv, rules=[TaskArithmetic(), Lines(0.5, 0.0)]), merge(tv, scale=0.5)
    assert all(torch.equal(merged[name], scaled[name]) for name in NAMES)


def test_the_shallow_factor_of_task_arithmetic_is_one_over_the_experts(tv):
    merged, expected = (merge(tv, rules=[TaskArithmetic(), Lines(alpha, 0.5)]) for alpha in (None, 1 / 5))
    assert_close(merged, expected, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    "rules", [[Trim(0.3), ElectSign("mean")], [TaskArithmetic(), Consensus()]], ids=["TIES", "masks"]
)
def test_the_shallow_factor_makes_up_for_what_was_dropped(tv, rules):
    # At β = 0, the change is as large in L1 as the mean task vector is.
    merged = merge(tv, rules=[*rules, Lines(beta=0.0)])
    size = sum(float(value.abs().sum()) for value in merged.values())
    mean = sum(float(tv.deltas[name].mean(0).abs().sum()) for name in NAMES)
    assert size == pytest.approx(mean, rel=1e-12)


def test_a_merge_that_changes_nothing_has_a_shallow_factor_too():
    stack = Stack("w", torch.zeros(2), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), ("a", "b"))
    assert shallow_scale(Changes(("w",), ("a", "b"), lambda: iter([(stack, stack.deltas.sum(0))]))) == 0.5


def test_given_both_factors_no_tensor_is_read():
    def read():
        raise AssertionError("a tensor was asked for")

    changes = Changes(NAMES, ("a", "b"), read)
    assert Lines(0.2, 0.4).fit(changes)["layers.1.w"] == pytest.approx(0.4)


@pytest.mark.parametrize(("alpha", "beta"), [(-0.1, 0.5), (0.1, -0.5), (float("nan"), 0.5), (None, float("inf"))])
def test_arguments_are_checked(alpha, beta):
    with pytest.raises(InputError, match=f"expected alpha >= 0 and beta >= 0 in Lines, got {alpha} and {beta}"):
        Lines(alpha, beta)
