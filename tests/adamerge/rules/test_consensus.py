"""What several experts need stays, entry by entry."""

import pytest
import torch

from adamerge import InputError, TaskVectors, merge
from adamerge.rules import Consensus, ElectSign, Mean, TaskArithmetic, Trim

# With λ = 1/2: needed by both, by the first, by none (0.4 of 1 and 1 of 0.4 each count), by both, by nobody.
ROWS = [[3.0, 9.0, 1.0, -2.0, 0.0], [2.0, 1.0, 1.0, -2.0, 0.0]]


@pytest.fixture
def tv() -> TaskVectors:
    base = {"w": torch.zeros(5)}
    return TaskVectors.from_state_dicts(base, {str(k): {"w": torch.tensor(row)} for k, row in enumerate(ROWS)})


def by_hand(rows: list[list[float]], change: list[float], threshold: float, agree: int) -> list[float]:
    """Σₖ 1[|τₖ| > λ |τ − τₖ|] ≥ agree, number by number."""
    kept = []
    for i, merged in enumerate(change):
        votes = sum(abs(row[i]) > threshold * abs(merged - row[i]) for row in rows)
        kept.append(merged if votes >= agree else 0.0)
    return kept


def test_what_one_expert_needs_is_left_out(tv):
    assert merge(tv, [TaskArithmetic(), Consensus(0.5)])["w"].tolist() == [5, 0, 2, -4, 0]
    assert merge(tv, [TaskArithmetic(), Consensus(0.5)], scale=0.5)["w"].tolist() == [2.5, 0, 1, -2, 0]
    assert merge(tv, [TaskArithmetic(), Consensus(0.5, agree=1)])["w"].tolist() == [5, 10, 2, -4, 0]


@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.1])
@pytest.mark.parametrize("agree", [1, 2, 3])
def test_masks_are_those_of_the_task_vectors_before_any_transform(threshold, agree):
    rows = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    tv = TaskVectors.from_state_dicts({"w": torch.zeros(60)}, {str(k): {"w": row} for k, row in enumerate(rows)})
    for rules in ([TaskArithmetic()], [Trim(0.3), ElectSign("sum")], [Mean()]):
        merged = merge(tv, rules=[*rules, Consensus(threshold, agree)], scale=0.5)["w"].tolist()
        change = merge(tv, rules=rules)["w"].tolist()
        assert merged == [x / 2 for x in by_hand(rows.tolist(), change, threshold, agree)]


def test_too_few_experts_are_refused(tv):
    with pytest.raises(InputError, match="Consensus keeps what 3 experts or more need, and there is 0, 1 alone"):
        merge(tv, rules=[TaskArithmetic(), Consensus(agree=3)])


@pytest.mark.parametrize(("threshold", "agree"), [(-0.1, 2), (0.4, 0)])
def test_arguments_are_checked(threshold, agree):
    with pytest.raises(InputError, match=f"expected threshold >= 0 and agree >= 1 in Consensus, got {threshold} and"):
        Consensus(threshold, agree)


def test_it_comes_last(tv):
    with pytest.raises(InputError, match="Consensus corrects what a rule has combined: put it after the others"):
        merge(tv, rules=[Consensus(), TaskArithmetic()])
