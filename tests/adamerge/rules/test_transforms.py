"""What all transforms share: nothing given is changed, fingerprints and ties stay, statistics and integers too."""

import copy
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from adamerge import CoefficientTable, InputError, TaskVectors, merge
from adamerge.deltas import Deltas, LowRank, Sparse, dense
from adamerge.rules import (
    Breadcrumbs,
    Cabs,
    ComPeft,
    Dare,
    Della,
    ElectSign,
    Emr,
    LearnedCoefficients,
    Mean,
    OneBit,
    PerTensor,
    Prune,
    Rebase,
    TallMask,
    TaskArithmetic,
    Transform,
    Trim,
    TruncatedSVD,
    transform,
)

TRANSFORMS = [
    Trim(0.3),
    Trim(0.3, scope="tensor"),
    ElectSign(),
    Breadcrumbs(0.4),
    Cabs(1, 3),
    Dare(0.4),
    Della(0.4, 0.2),
    Prune(0.3),
    Prune(0.3, sparse=False),
    TruncatedSVD(1),
    TruncatedSVD(0.6),
    Rebase(),
    TallMask(0.2),
    Emr(),
    OneBit(),
    ComPeft(0.4),
]
NAMES = [f"{type(step).__name__}-{i}" for i, step in enumerate(TRANSFORMS)]
IDENTITIES = [
    Trim(1.0),
    Trim(1.0, scope="tensor"),
    Dare(0.0),
    Della(0.0, 0.0),
    Breadcrumbs(1.0, 0.0),
    Prune(1.0),
    Prune(1.0, sparse=False),
    TruncatedSVD(1.0),
    TruncatedSVD(99),
]

every_transform = pytest.mark.parametrize("step", TRANSFORMS, ids=NAMES)


def identical(left: Mapping[str, Tensor | Deltas], right: Mapping[str, Tensor | Deltas]) -> bool:
    """Same names in the same order, same dtypes, same bits."""
    return list(left) == list(right) and all(
        left[n].dtype == right[n].dtype and torch.equal(dense(left[n]), dense(right[n])) for n in left
    )


@every_transform
def test_what_goes_in_is_not_changed(base, experts, step):
    kept = copy.deepcopy((base, experts))
    tv = TaskVectors.from_state_dicts(base, experts)
    deltas = {name: delta.clone() for name, delta in tv.deltas.items()}
    first, second = step(tv), step(tv)
    assert identical(tv.deltas, deltas)
    assert identical(base, kept[0])
    assert all(identical(experts[task], kept[1][task]) for task in experts)
    assert identical(first.deltas, second.deltas), "a transform remembers what it has seen"
    assert not any(delta is tv.deltas[name] for name, delta in first.deltas.items() if name == "0.weight")


@every_transform
def test_fingerprints_are_those_of_the_experts(tv, step):
    assert step(tv).fingerprints == tv.fingerprints
    unhashed = TaskVectors(tv.base, tv.deltas, tv.tasks)
    assert step(unhashed).fingerprints == tv.fingerprints


@every_transform
def test_shapes_dtypes_and_tasks_stay(tv, step):
    after = step(tv)
    assert after.tasks == tv.tasks
    assert list(after.deltas) == list(tv.deltas)
    for name, delta in after.deltas.items():
        assert delta.shape == tv.deltas[name].shape
        assert delta.dtype == tv.deltas[name].dtype
    assert after.rows == tv.rows


@pytest.mark.parametrize("step", IDENTITIES, ids=lambda step: type(step).__name__)
def test_the_limits_change_nothing(tv, step):
    assert identical(step(tv).deltas, tv.deltas)


@every_transform
def test_statistics_and_integers_stay(step):
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).double()
    states = []
    for shift in range(3):
        state = {name: value + shift * torch.rand(value.shape) for name, value in network.state_dict().items()}
        states.append({**state, "1.num_batches_tracked": torch.tensor(shift), "position_ids": torch.arange(3) + shift})
    tv = TaskVectors.from_state_dicts(states[0], {"a": states[1], "b": states[2]})
    after = step(tv)
    merged, plain = merge(after), merge(tv)
    for name in ("1.running_mean", "1.running_var"):
        assert torch.equal(after.deltas[name], tv.deltas[name])
        assert torch.equal(merged[name], plain[name])
    assert merged["1.num_batches_tracked"] == 0
    assert merged["position_ids"].tolist() == [0, 1, 2]


@every_transform
def test_tied_tensors_are_transformed_once_and_stay_tied(step):
    states = []
    for seed in range(3):
        weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)).double()
        states.append({"embed.weight": weight, "norm": weight[0].clone(), "head.weight": weight})
    tv = TaskVectors.from_state_dicts(states[0], {"a": states[1], "b": states[2]})
    after = step(tv)
    assert after.tied == {"head.weight": "embed.weight"}
    assert list(after.deltas) == ["embed.weight", "norm"]
    merged, expert = merge(after, scale=0.3), after.expert("a")
    assert torch.equal(merged["embed.weight"], merged["head.weight"])
    assert torch.equal(expert["embed.weight"], expert["head.weight"])
    assert after.base["embed.weight"].data_ptr() == after.base["head.weight"].data_ptr()


@every_transform
def test_what_no_expert_changed_takes_no_memory(base, experts, step):
    base["frozen"] = torch.randn(100, 100)
    tv = TaskVectors.from_state_dicts(base, {t: {**e, "frozen": base["frozen"].clone()} for t, e in experts.items()})
    after = step(tv)
    assert after.deltas["frozen"].untyped_storage().nbytes() == 4
    assert "frozen" not in after.rows
    assert torch.equal(merge(after, scale=0.3)["frozen"], base["frozen"])


@pytest.fixture
def files(base, experts, tmp_path) -> dict[str, str]:
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    return {name: f"{tmp_path}/{name}.safetensors" for name in ("base", *experts)}


@every_transform
def test_files_give_what_memory_gives(tv, experts, files, step):
    lazy = TaskVectors.open(files["base"], {task: files[task] for task in experts})
    after, expected = step(lazy), step(tv)
    assert sorted(after.deltas) == sorted(expected.deltas)
    for form in (after, after.load()):
        assert all(torch.equal(dense(form.deltas[name]), dense(expected.deltas[name])) for name in expected.deltas)
        assert sorted(form.rows) == sorted(expected.rows)
        assert form.fingerprints == tv.fingerprints
    merged, wanted = merge(after, scale=0.3), merge(expected, scale=0.3)
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def test_files_are_read_tensor_by_tensor(experts, files):
    lazy = TaskVectors.open(files["base"], {task: files[task] for task in experts})
    after = transform(lazy, [Trim(0.3), ElectSign()])
    assert not isinstance(after.deltas, dict)
    assert isinstance(after.load().deltas, dict)
    assert after.load().load().deltas.keys() == lazy.deltas.keys()


def test_transforms_apply_in_order(tv):
    steps = [Trim(0.5), ElectSign(), TruncatedSVD(2)]
    expected = tv
    for step in steps:
        expected = step(expected)
    assert identical(transform(tv, steps).deltas, expected.deltas)
    assert transform(tv, []) is tv


@pytest.mark.parametrize("first", [Prune(0.5), TruncatedSVD(1)], ids=lambda step: type(step).__name__)
@pytest.mark.parametrize("second", TRANSFORMS, ids=NAMES)
def test_compressed_deltas_are_transformed_as_dense_ones(tv, first, second):
    compressed = first(tv)
    plain = TaskVectors(tv.base, {n: dense(d) for n, d in compressed.deltas.items()}, tv.tasks, {}, tv.fingerprints)
    after, expected = second(compressed), second(plain)
    for name in expected.deltas:
        assert_close(dense(after.deltas[name]), dense(expected.deltas[name]), rtol=0, atol=1e-12)


def test_sparse_deltas_stay_sparse_where_entries_are_dropped(tv):
    after = transform(tv, [Prune(0.5), Trim(0.5), ElectSign()])
    assert all(isinstance(after.deltas[name], Sparse) for name in after.rows)


@pytest.mark.parametrize("step", [Prune(0.4), TruncatedSVD(1)], ids=lambda step: type(step).__name__)
def test_compressed_deltas_merge_and_rebuild_experts(tv, base, step):
    after = step(tv)
    assert any(isinstance(delta, LowRank | Sparse) for delta in after.deltas.values())
    merged = merge(after, scale=0.3)
    for name, value in base.items():
        moved = dense(after.deltas[name])
        assert_close(merged[name], value + 0.3 * moved.sum(0), rtol=0, atol=1e-14)
        for k, task in enumerate(tv.tasks):
            assert_close(after.expert(task)[name], value + moved[k], rtol=0, atol=1e-14)


# -- in a merge --------------------------------------------------------------------------------------------------------


def test_a_merge_takes_transforms_and_then_a_rule(tv):
    for steps in ([Trim(0.3)], [Trim(0.3), ElectSign()], [Prune(0.5), TruncatedSVD(2)], [Rebase()]):
        for rule in (Mean(), TaskArithmetic()):
            expected = merge(transform(tv, steps), rules=[rule], scale=0.3)
            assert identical(merge(tv, rules=[*steps, rule], scale=0.3), expected)


def test_after_transforms_alone_the_sum_is_taken(tv):
    for steps in ([Trim(0.3)], [Prune(0.3)], [TruncatedSVD(1)]):
        expected = merge(tv, rules=[*steps, TaskArithmetic()], scale=0.3)
        assert identical(merge(tv, rules=steps, scale=0.3), expected)


def test_learned_coefficients_of_a_ties_split(tv, base):
    steps = [Trim(0.4), ElectSign()]
    rows = {name: {task: 0.1 * (k + 1) for k, task in enumerate(tv.tasks)} for name in base}
    merged = merge(tv, rules=[*steps, LearnedCoefficients(CoefficientTable(rows))])
    split = transform(tv, steps)
    for name, value in base.items():
        expected = value + sum(0.1 * (k + 1) * split.deltas[name][k] for k in range(3))
        assert_close(merged[name], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Trim(), Mean(), TaskArithmetic()], r"expected one merging rule, got 2: \['Trim', 'Mean', 'TaskArithmetic'\]"),
        ([Mean(), Trim()], "Mean combines the experts: put it last"),
        ([TaskArithmetic(), ElectSign()], "TaskArithmetic combines the experts: put it last"),
        ([Rebase()], "Rebase does not combine the experts: end the list with a rule that does"),
        *(
            ([rule], f"{type(rule).__name__} gives one model per task: write them with `adamerge compress`.*expert")
            for rule in (TallMask(), Emr(), OneBit(), ComPeft())
        ),
        ([Emr(), Trim(), Mean()], "Trim after Emr drops entries that have voted: put Trim before Emr"),
        ([ElectSign(), Trim()], "Trim after ElectSign drops entries that have voted: put Trim before ElectSign"),
        ([ElectSign(), Prune(), Mean()], "Prune after ElectSign drops entries that have voted"),
        ([Trim(), ElectSign("mean"), Mean()], r"ElectSign\('mean'\) combines the experts, and so does Mean"),
    ],
)
def test_lists_that_make_no_sense_are_refused(tv, rules, message):
    with pytest.raises(InputError, match=message):
        merge(tv, rules=rules)


def test_a_rule_is_no_transform(tv):
    with pytest.raises(InputError, match="Mean combines the experts: it transforms no task vectors"):
        transform(tv, [Trim(), Mean()])


def test_the_order_is_checked_without_a_merge_too(tv):
    with pytest.raises(InputError, match="put Trim before ElectSign"):
        transform(tv, [ElectSign(), Trim()])


# -- one's own ---------------------------------------------------------------------------------------------------------


def test_a_transform_of_ones_own_is_a_tensor_function(tv):
    class Halve(PerTensor[None]):
        def tensor(self, name, deltas, statistics):
            return dense(deltas) / 2

    assert identical(merge(tv, rules=[Halve(), TaskArithmetic()], scale=0.5), merge(tv, scale=0.25))
    assert issubclass(Halve, Transform)


@pytest.mark.parametrize(
    ("step", "arguments"),
    [
        (Trim(0.3, count_unchanged=True), {"keep": 0.3, "count_unchanged": True}),
        (Prune(0.3, sparse=False), {"keep": 0.3, "sparse": False}),
        (TruncatedSVD(0.5, exclude="bias"), {"rank": 0.5, "exclude": "bias"}),
        (Rebase(scale=0.4), {"scale": 0.4}),
        (TallMask({"a": 0.2}), {"threshold": {"a": 0.2}}),
        (ComPeft(0.1, scale=2.0), {"keep": 0.1, "scale": 2.0}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arguments_can_be_read_back(step, arguments):
    assert {name: getattr(step, name) for name in arguments} == arguments
