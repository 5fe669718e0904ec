"""Merging rules on one tensor: what they combine, and the coefficients that do not fit."""

import pytest
import torch
from torch.testing import assert_close

from adamerge import CoefficientTable, InputError, TaskVectors, merge, write_coefficients
from adamerge.rules import LearnedCoefficients, Mean, Rule, Stack, TaskArithmetic

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
TASKS = ("digits", "letters", "signs")


def one_hot(task: str) -> CoefficientTable:
    return CoefficientTable({name: {other: float(other == task) for other in TASKS} for name in NAMES})


def test_task_arithmetic_sums_and_the_mean_divides():
    deltas = torch.tensor([[1.0, 2.0], [3.0, -4.0], [2.0, 5.0]])
    stack = Stack("w", torch.zeros(2), deltas, TASKS)
    assert TaskArithmetic().combine(stack, None).tolist() == [6.0, 3.0]
    assert Mean().combine(stack, None).tolist() == [2.0, 1.0]


@pytest.mark.parametrize("rule", [TaskArithmetic(), Mean()], ids=lambda rule: type(rule).__name__)
def test_a_half_precision_base_is_summed_in_the_dtype_of_the_deltas(rule):
    base, deltas = torch.tensor([40000.0]).half(), torch.tensor([[0.25], [0.25]])
    merged = rule.merged(Stack("w", base.float(), deltas, ("a", "b")), None, 1.0)
    assert merged.dtype == torch.float32
    assert merged == base.float() + (0.25 if isinstance(rule, Mean) else 0.5)


@pytest.mark.parametrize("task", TASKS)
def test_one_hot_coefficients_are_the_expert(tv, experts, task):
    merged = merge(tv, rules=[LearnedCoefficients(one_hot(task))])
    assert all(torch.equal(merged[name], experts[task][name]) for name in NAMES)


def test_zero_coefficients_are_the_base(tv, base):
    table = CoefficientTable({name: dict.fromkeys(TASKS, 0.0) for name in NAMES})
    merged = merge(tv, rules=[LearnedCoefficients(table)])
    assert all(torch.equal(merged[name], base[name]) for name in NAMES)


def test_equal_coefficients_are_task_arithmetic(tv):
    table = CoefficientTable({name: dict.fromkeys(TASKS, 0.3) for name in NAMES})
    assert_close(merge(tv, rules=[LearnedCoefficients(table)]), merge(tv, scale=0.3), rtol=0, atol=1e-15)


def test_every_tensor_and_task_has_its_own_coefficient(tv, base, experts):
    rows = {n: {t: 10.0 * i + k for k, t in enumerate(TASKS)} for i, n in enumerate(NAMES)}
    merged = merge(tv, rules=[LearnedCoefficients(CoefficientTable(rows))], scale=0.5)
    for name in NAMES:
        expected = base[name] + 0.5 * sum(rows[name][t] * (experts[t][name] - base[name]) for t in TASKS)
        assert_close(merged[name], expected, rtol=1e-14, atol=1e-14)


def test_coefficients_go_by_name_whatever_the_order(tv, base, experts):
    rows = {n: {t: 10.0 * i + k for k, t in enumerate(TASKS)} for i, n in enumerate(NAMES)}
    shuffled = {n: dict(reversed(rows[n].items())) for n in reversed(NAMES)}
    other = TaskVectors.from_state_dicts(base, {task: experts[task] for task in ("signs", "digits", "letters")})
    expected = merge(tv, rules=[LearnedCoefficients(CoefficientTable(rows))])
    assert_close(merge(other, rules=[LearnedCoefficients(CoefficientTable(shuffled))]), expected, rtol=0, atol=1e-12)


def test_coefficients_from_a_file(tv, tmp_path):
    write_coefficients(one_hot("letters"), tmp_path / "c.json")
    from_file, from_table = (
        merge(tv, rules=[LearnedCoefficients(source)]) for source in (tmp_path / "c.json", one_hot("letters"))
    )
    assert all(torch.equal(from_file[name], from_table[name]) for name in NAMES)


def test_coefficients_for_other_tasks_are_refused(tv):
    table = CoefficientTable({name: {"digits": 1.0, "cars": 1.0} for name in NAMES})
    with pytest.raises(
        InputError, match=r"for tasks \['cars', 'digits'\], the experts are \['digits', 'letters', 'signs'\]"
    ):
        merge(tv, rules=[LearnedCoefficients(table)])


def test_columns_are_weighted_by_their_own_coefficients(tv, base, experts):
    rows = {name: dict.fromkeys(TASKS, 0.5) for name in NAMES}
    rows["0.weight"] = {task: [float(j == k) for j in range(6)] for k, task in enumerate(TASKS)}
    merged = merge(tv, rules=[LearnedCoefficients(CoefficientTable(rows))])["0.weight"]
    for k, task in enumerate(TASKS):
        assert torch.equal(merged[:, k], experts[task]["0.weight"][:, k])
    assert torch.equal(merged[:, 3:], base["0.weight"][:, 3:])


@pytest.mark.parametrize("name", ["0.weight", "0.bias"])
def test_columns_of_another_width_are_named(tv, name):
    rows = {**one_hot("digits").rows, name: {task: [0.1, 0.2] for task in TASKS}}
    with pytest.raises(InputError, match=rf"{name} has 2 coefficients per task, and shape"):
        merge(tv, rules=[LearnedCoefficients(CoefficientTable(rows))])


def test_a_changed_tensor_without_coefficients_is_named(tv):
    rows = dict(one_hot("digits").rows)
    del rows["2.bias"]
    with pytest.raises(InputError, match=r"no coefficient for tensor 2.bias, which the experts changed"):
        merge(tv, rules=[LearnedCoefficients(CoefficientTable(rows))])


def test_an_unchanged_tensor_needs_no_coefficients(base, experts):
    base["frozen"], base["scale"] = torch.ones(5), torch.tensor(2.0)
    experts = {t: {**e, "frozen": torch.ones(5), "scale": torch.tensor(2.0)} for t, e in experts.items()}
    merged = merge(TaskVectors.from_state_dicts(base, experts), rules=[LearnedCoefficients(one_hot("digits"))])
    assert merged["frozen"].tolist() == [1.0] * 5
    assert merged["scale"] == 2.0


def test_a_scalar_takes_a_coefficient():
    tv = TaskVectors.from_state_dicts({"s": torch.tensor(1.0)}, {"a": {"s": torch.tensor(3.0)}})
    assert merge(tv, rules=[LearnedCoefficients(CoefficientTable({"s": {"a": 0.25}}))])["s"] == 1.5


def test_a_rule_of_ones_own_is_a_combine(tv, base, experts):
    class Largest(Rule):
        """The entry that moved furthest."""

        def combine(self, stack, statistics):
            return stack.deltas.gather(0, stack.deltas.abs().argmax(0, keepdim=True))[0]

    merged = merge(tv, rules=[Largest()], scale=0.5)
    alone = TaskVectors.from_state_dicts(base, {"digits": experts["digits"]})
    assert all(torch.equal(merge(alone, rules=[Largest()])[name], experts["digits"][name]) for name in NAMES)
    moved = torch.stack([experts[task]["0.bias"] - base["0.bias"] for task in TASKS])
    expected = torch.where(moved.abs().max(0).values == moved.max(0).values, moved.max(0).values, moved.min(0).values)
    assert torch.equal(merged["0.bias"], base["0.bias"] + 0.5 * expected)
