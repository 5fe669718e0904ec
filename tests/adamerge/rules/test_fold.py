"""One expert after the other gives what all give at once."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from adamerge import InputError, TaskVectors, fold, merge
from adamerge.rules import Consensus, Fold, MagMax, Mean, MetaGpt, TaskArithmetic, Trim

RULES = [(Mean(), 1.0), (Mean(), 0.5), (TaskArithmetic(), 1.0), (TaskArithmetic(), 0.3), (MagMax(), 0.5)]
every_rule = pytest.mark.parametrize(
    ("rule", "scale"), RULES, ids=lambda value: str(getattr(value, "__class__", value))
)


def one_by_one(base, experts, rule, scale):
    first, *others = experts.values()
    merged = merge(TaskVectors.from_state_dicts(base, {"first": first}), [rule], scale)
    for count, expert in enumerate(others, 1):
        merged = fold(merged, base, expert, rule, count, scale)
    return merged


@every_rule
def test_folding_is_merging_at_once(base, experts, rule, scale):
    at_once = merge(TaskVectors.from_state_dicts(base, experts), [rule], scale)
    for name, value in one_by_one(base, experts, rule, scale).items():
        assert_close(value, at_once[name], rtol=0, atol=1e-14)


def test_the_numbers():
    base = {"w": torch.tensor([1.0, 1.0])}
    merged, expert = {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([9.0, -5.0])}
    assert fold(merged, base, expert, Mean(), 2)["w"].tolist() == [(3 + 3 + 9) / 3, (1 + 1 - 5) / 3]
    assert fold(merged, base, expert, Mean(), 3, scale=0.5)["w"].tolist() == [1 + (3 * 2 + 4) / 4, 1 + (0 - 3) / 4]
    assert fold(merged, base, expert, TaskArithmetic(), 2, scale=0.5)["w"].tolist() == [7.0, -2.0]


@every_rule
def test_statistics_are_the_mean_of_all_experts(rule, scale):
    state = nn.BatchNorm1d(4).double().state_dict()
    experts = {t: {n: v + k for n, v in state.items()} for k, t in enumerate("abc", 1)}
    merged = one_by_one(state, experts, rule, scale)
    assert_close(merged["running_var"], torch.full((4,), 3.0).double(), rtol=0, atol=1e-14)
    assert merged["num_batches_tracked"] == 0


def test_files_are_folded_as_they_are_merged(base, experts, tmp_path):
    merged = merge(TaskVectors.from_state_dicts(base, {t: experts[t] for t in ("digits", "letters")}), [Mean()])
    for name, state in {"base": base, "so far": merged, "new": experts["signs"]}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("so far", "new")}
    found = merge(TaskVectors.open(tmp_path / "base.safetensors", files), [Fold(Mean(), 2)])
    expected = fold(merged, base, experts["signs"], Mean(), 2)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("rules", [[Trim(0.2), Fold(Mean(), 2)], [Fold(Mean(), 2), Consensus()]])
def test_nothing_else_changes_a_merge_that_an_expert_joins(base, experts, rules):
    two = dict(list(experts.items())[:2])
    with pytest.raises(InputError, match=r"(Trim|Consensus) would change that merge once more: leave \1 out"):
        merge(TaskVectors.from_state_dicts(base, two), rules)


def test_what_cannot_be_folded_is_refused(base, experts):
    with pytest.raises(
        InputError, match=r"MetaGpt needs all experts at once; rules that can be folded are MagMax, Mean, Opcm, Task"
    ):
        Fold(MetaGpt(), 2)
    with pytest.raises(InputError, match=r"expected count to be the number of experts .* got 0"):
        Fold(Mean(), 0)
    with pytest.raises(InputError, match="Fold takes 2 experts, got 3: digits, letters, signs"):
        merge(TaskVectors.from_state_dicts(base, experts), [Fold(Mean(), 2)])
    other = {**experts["signs"], "more": torch.ones(2)}
    with pytest.raises(InputError, match="expert 'the new expert' does not have the tensors of the base"):
        fold(base, base, other, Mean(), 1)
