"""Swaps: entries that are close, and blocks by their numbers."""

import pytest
import torch

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import LayerSwap, NearSwap


def test_nearswap_moves_each_entry_by_t_at_most():
    base = {"w": torch.full((5,), 7.0)}
    a, b = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])}, {"w": torch.tensor([1.0, 1.25, 2.0, 0.75, -3.0])}
    merged = merge(TaskVectors.from_state_dicts(base, {"a": a, "b": b}), [NearSwap(0.5)])["w"]
    assert merged.tolist() == [1.0, 1.25, 1.5, 0.75, 0.5]


@pytest.mark.parametrize("t", [0.0, -1.0])
def test_nearswap_wants_a_distance(t):
    with pytest.raises(InputError, match=f"expected t > 0 in NearSwap, got {t}"):
        NearSwap(t)


def blocks(value: float, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 2), value) for name in names}


def shares(names: list[str], rule: LayerSwap) -> dict[str, float]:
    """The inner expert's share of each tensor."""
    experts = {"maths": blocks(1.0, names), "swahili": blocks(0.0, names)}
    merged = merge(TaskVectors.from_state_dicts(blocks(0.5, names), experts), [rule])
    return {name: float(value[0, 0]) for name, value in merged.items()}


LAYERS = ["embed.weight", *(f"model.layers.{i}.mlp.weight" for i in range(12)), "model.norm.weight", "lm_head.weight"]


@pytest.mark.parametrize(
    ("bottom", "top", "transition", "expected"),
    [
        (3, 2, 1, "000.11111.00"),
        (3, 2, 0, "000111111100"),
        (2, 1, 3, "00...111...0"),
        (0, 2, 2, "11111111..00"),
        (3, 0, 1, "000.11111111"),
        (0, 0, 4, "111111111111"),
        (5, 4, 2, "00000...0000"),
    ],
)
def test_the_inner_blocks_are_the_inner_experts(bottom, top, transition, expected):
    found = shares(LAYERS, LayerSwap("swahili", "maths", bottom, top, transition))
    assert [found[name] for name in LAYERS[1:13]] == [{"0": 0.0, "1": 1.0, ".": 0.5}[letter] for letter in expected]
    assert [found[name] for name in (LAYERS[0], *LAYERS[13:])] == [0.0] * 3


def test_every_stack_is_cut_and_short_ones_are_outside():
    names = (
        [f"vision.blocks.{i}.w" for i in (2, 0, 3, 1)] + [f"text.{i}.w" for i in range(3)] + ["head.0.w", "head.1.w"]
    )
    found = shares(names, LayerSwap("swahili", "maths", bottom=1, top=1, transition=0))
    assert {name for name, share in found.items() if share} == {"vision.blocks.1.w", "vision.blocks.2.w", "text.1.w"}


def test_blocks_are_in_the_order_of_their_numbers():
    found = shares([f"{i}.w" for i in (10, 9, 2, 0, 1)], LayerSwap("swahili", "maths", 3, 1, 0))
    assert [name for name, share in found.items() if share] == ["9.w"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (LayerSwap("swahili", "maths", 9, 3), r"LayerSwap has 9 \+ 3 outer blocks, and the longest stack .* only 12"),
        (LayerSwap("swahili", "history"), "LayerSwap is for 'swahili' and 'history', the experts are"),
    ],
)
def test_what_does_not_fit_is_refused(rule, message):
    with pytest.raises(InputError, match=message):
        shares(LAYERS, rule)


def test_a_number_of_blocks_is_wanted():
    with pytest.raises(InputError, match="expected top >= 0 in LayerSwap, got -1"):
        LayerSwap("swahili", "maths", top=-1)
