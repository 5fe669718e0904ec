"""Scales by tensor: one number, gradients over the blocks, patterns of names; and tensors left out."""

import pytest
import torch

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import TaskArithmetic, Trim
from adamerge.scales import interpolate, per_tensor

NAMES = [
    "embed_tokens.weight",
    "layers.0.mlp.w",
    "layers.1.mlp.w",
    "layers.2.attn.w",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.fixture
def tv() -> TaskVectors:
    base = {name: torch.zeros(4) for name in NAMES}
    return TaskVectors.from_state_dicts(base, {"a": {name: torch.arange(1.0, 5.0) for name in NAMES}})


def test_one_number_is_for_every_tensor():
    assert per_tensor(0.3, NAMES) == dict.fromkeys(NAMES, 0.3)


def test_a_gradient_runs_over_the_blocks_and_ends_with_the_head():
    assert list(per_tensor([0.0, 1.0], NAMES).values()) == [0.0, 0.0, 0.5, 1.0, 1.0, 1.0]
    assert list(per_tensor([0, 4, 0], NAMES).values()) == [0.0, 0.0, 4.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("gradient", "at", "expected"),
    [(2, 0.7, 2.0), ([3], 0.7, 3.0), ([1, 2], 0.25, 1.25), ([1, 2, 4], 0.75, 3.0), ([1, 2, 4], 1.0, 4.0)],
)
def test_interpolation(gradient, at, expected):
    assert interpolate(gradient, at) == expected


def test_the_first_pattern_counts():
    found = per_tensor({"mlp": [0.2, 0.6], r"^layers\.": 0.1, ".*": 1}, NAMES)
    assert [round(value, 9) for value in found.values()] == [1.0, 0.2, 0.4, 0.1, 1.0, 1.0]


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ({"mlp": 0.3}, r"no pattern of the scale matches embed_tokens\.weight: end with '\.\*'"),
        ({"mpl": 0.3, ".*": 1.0}, "no tensor has a name that matches 'mpl'"),
        ({"(": 0.3}, r"'\(' is no regular expression"),
        ([], "at least one number"),
        (float("nan"), "expected a scale to be finite, got nan"),
        ({".*": [0.1, float("inf")]}, "expected a scale to be finite"),
    ],
)
def test_scales_that_make_no_sense(tv, scale, words):
    with pytest.raises(InputError, match=words):
        merge(tv, scale=scale)


def test_a_merge_scales_each_tensor_by_its_own_number(tv):
    merged = merge(tv, [TaskArithmetic()], scale={"norm": 2.0, ".*": [0.0, 1.0]})
    assert {name: value[1].item() for name, value in merged.items()} == dict(
        zip(NAMES, [0, 0, 1, 2, 4, 2], strict=True)
    )


def test_excluded_tensors_stay_the_bases_and_are_not_counted(tv):
    merged = merge(tv, [Trim(keep=0.25)], exclude=["embed", "lm_head"])
    assert not merged["embed_tokens.weight"].any()
    assert not merged["lm_head.weight"].any()
    assert merged["layers.0.mlp.w"].tolist() == [0, 0, 3, 4]
    large = TaskVectors.from_state_dicts(
        {"u": torch.zeros(2), "v": torch.zeros(2)},
        {"a": {"u": torch.tensor([1.0, 2.0]), "v": torch.tensor([8.0, 9.0])}},
    )
    assert merge(large, [Trim(keep=0.25)])["u"].tolist() == [0, 0]
    assert merge(large, [Trim(keep=0.5)], exclude=["v"])["u"].tolist() == [1, 2]


def test_a_pattern_to_exclude_must_match(tv):
    with pytest.raises(InputError, match="no tensor has a name that matches 'lm_haed'"):
        merge(tv, exclude=["lm_haed"])
