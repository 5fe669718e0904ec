"""What every rule of `adamerge.rules` must do, whatever it computes. A new rule needs an entry in `CASES`.

Every tensor of `state` is an edge case of its own: a scalar, one column, few elements, tied, never changed, integers.
"""

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

import pytest
import torch
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

import adamerge.rules
from adamerge import CoefficientTable, InputError, TaskVectors, merge
from adamerge.observing import Observation
from adamerge.rules import (
    Aim,
    Breadcrumbs,
    Cabs,
    Cart,
    ComPeft,
    Consensus,
    CoPa,
    Correction,
    Dare,
    Della,
    Doge,
    Drm,
    ElectSign,
    Emr,
    Expo,
    Fisher,
    Fold,
    FwMerging,
    IsoC,
    IsoCts,
    Karcher,
    KnOts,
    LayerSwap,
    LearnedCoefficients,
    Linear,
    Lines,
    LoraLego,
    LoRe,
    MagMax,
    Matrices,
    MaTs,
    Mean,
    Merged,
    MetaGpt,
    ModelStock,
    MultiSlerp,
    NearSwap,
    NuSlerp,
    OneBit,
    Opcm,
    Pcb,
    Prune,
    Ram,
    Rebase,
    RegMean,
    RegMeanPlusPlus,
    Rule,
    Sce,
    SensMerging,
    Slerp,
    Star,
    Stf,
    Store,
    Svc,
    TallMask,
    TaskArithmetic,
    Transform,
    Trim,
    TruncatedSVD,
    TsvM,
    Widen,
    Wudi,
)
from adamerge.statistics import Statistics

State = dict[str, Tensor]
TASKS = ("digits", "letters", "signs")

SHAPES = {
    "scalar": (), "one": (1,), "vector": (7,), "column": (5, 1), "row": (1, 5), "conv.weight": (3, 2, 2, 2),
    "blocks.0.weight": (9, 12), "blocks.1.weight": (9, 12), "blocks.2.weight": (9, 12), "blocks.3.weight": (9, 12),
    "wide.weight": (30, 40), "embed.weight": (11, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One rule with arguments. Defaults are what a rule should do; an entry that differs says why in a comment.

    Attributes:
        rule: the class.
        arguments: of its constructor; a function of the tasks where they depend on them.
        experts: how many it takes, where that is not any number.
        alone: whether one expert, at scale 1, comes out as it is.
        identical: what K identical experts give at scale 1: the "expert", the "sum" θ₀ + Kτ, or "other".
        ordered: whether the order of the experts matters.
        moves_base: whether scale 0 gives something else than the base.
        linear: whether the merge is linear in the scale.
        scales_base: whether experts that are all the base give something else than the base.
        adds_up: whether `fit` adds numbers up, whose last bits depend on the pieces that they are added in.
        bound: opposite experts ±τ move no entry further than this many times the largest |τ|.
    """

    rule: type
    arguments: dict[str, Any] | Callable[[Sequence[str]], dict[str, Any]] = field(default_factory=dict)
    experts: int | None = None
    alone: bool = True
    identical: Literal["expert", "sum", "other"] = "expert"
    ordered: bool = False
    moves_base: bool = False
    linear: bool = True
    scales_base: bool = False
    adds_up: bool = False
    bound: float = 2.0

    def steps(self, tasks: Sequence[str] = TASKS) -> list[Any]:
        """A list for `merge` with the rule in it."""
        step = self.rule(**self.given(tasks))
        if isinstance(step, Rule):
            return [step]
        return [TaskArithmetic(), step] if isinstance(step, Correction) else [step, TaskArithmetic()]

    def given(self, tasks: Sequence[str] = TASKS) -> dict[str, Any]:
        return self.arguments(tasks) if callable(self.arguments) else self.arguments

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS[: self.experts or 3]


def table(tasks: Sequence[str]) -> dict[str, Any]:
    return {"table": CoefficientTable({name: dict.fromkeys(tasks, 1 / len(tasks)) for name in SHAPES})}


def measured(tasks: Sequence[str]) -> dict[str, Any]:
    """Statistics of these experts: Grams of the square of a matrix, one of them with inputs that are always 0."""
    found = {}
    for task in tasks:
        rng = torch.Generator().manual_seed(100 + (*TASKS, "base").index(task))
        tensors = {}
        for name in ("blocks.0.weight", "blocks.1.weight", "blocks.2.weight", "wide.weight", "column"):
            rows, columns = SHAPES[name]
            x = torch.randn(2 * columns, columns, generator=rng, dtype=torch.float64)
            y = torch.randn(2 * rows, rows, generator=rng, dtype=torch.float64)
            x[:, :3] *= name != "blocks.1.weight"
            tensors |= {f"gram/{name}": x.T @ x, f"merged_gram/{name}": x.T @ x, f"output_gram/{name}": y.T @ y}
            tensors |= {f"magnitude/{name}": x.abs().mean(0)}
        for name, shape in SHAPES.items():
            tensors[f"sensitivity/{name}"] = torch.rand((), generator=rng, dtype=torch.float64)
            tensors[f"fisher/{name}"] = torch.randn(shape, generator=rng, dtype=torch.float64).square()
            weights = {other: 1.0 + (*TASKS, "base").index(other) for other in tasks}
            tensors[f"share/{name}"] = torch.tensor(weights[task] / sum(weights.values()), dtype=torch.float64)
        tensors["fisher/vector"] = torch.zeros(7, dtype=torch.float64)
        tensors |= {f"agreement/{other}": torch.tensor((len(task) - len(other)) / 10) for other in tasks}
        found[task] = Observation(tensors)
    return {"statistics": Statistics(found)}


# A line per rule, more where arguments make another rule of it, alphabetically. What transforms leave is summed.
CASES = [
    # Less change where the base looks.
    Case(Aim, lambda tasks: measured(("base",)), alone=False, identical="other"),
    Case(Breadcrumbs, {"keep": 0.3, "outliers": 0.1}, alone=False, identical="other"),  # drops entries
    Case(Cabs, {"n": 2, "m": 8}, alone=False, identical="other", ordered=True),  # the first expert has the choice
    Case(Cart, moves_base=True),  # from the mean
    Case(ComPeft, {"keep": 0.3}, alone=False, identical="other", adds_up=True),  # drops entries, keeps signs
    Case(Consensus, {"threshold": 0.3}, experts=2, identical="sum"),
    Case(CoPa, alone=False, identical="other", bound=4.0),  # drops entries of factors, scales both by 2
    Case(Dare, {"drop": 0.5}, alone=False, identical="other"),  # drops entries
    Case(Della, alone=False, identical="other"),  # drops entries
    Case(Doge, {"steps": 10}, alone=False, identical="other"),  # drops entries, of another length
    Case(Drm, alone=False, identical="other"),  # drops entries
    Case(Drm, {"keep": 1.0, "vertical": True}),
    Case(ElectSign, identical="sum"),
    Case(ElectSign, {"combine": "mean"}),
    Case(Emr, identical="sum", adds_up=True, bound=3.0),  # what is left of ±τ is as large as τ was
    Case(Expo, experts=1, identical="other"),  # goes further than the expert
    Case(Fisher, measured, bound=1.0),
    Case(Fisher, lambda tasks: {**measured(tasks), "normalize": False}, bound=1.0),
    # A merge of one expert and one more; statistics too.
    Case(Fold, {"rule": Mean(), "count": 1}, experts=2),
    Case(FwMerging, measured, bound=1.0),
    Case(IsoC, alone=False, identical="other"),  # flattens the spectrum
    Case(IsoCts, alone=False, identical="other"),  # flattens the spectrum
    Case(Karcher),
    Case(Karcher, {"on": "task_vectors"}),
    Case(KnOts, {"rules": [Mean()]}),
    Case(KnOts, {"rules": [Trim(0.3), ElectSign("mean")], "vertical": True}, alone=False, identical="other"),  # drops
    Case(LayerSwap, {"outer": "digits", "inner": "letters", "bottom": 1, "top": 1}, experts=2),
    Case(LearnedCoefficients, table),
    Case(Linear),
    Case(Linear, {"weights": {"letters": 0.5, "digits": 0.3, "signs": 0.4}}, experts=3),
    # Weights by position, and a base that is scaled too.
    Case(
        Linear,
        {"weights": [0.5, 0.3, 0.4], "normalize": False},
        experts=3,
        identical="other",
        ordered=True,
        scales_base=True,
    ),
    Case(Lines, alone=False, identical="other", adds_up=True),  # another factor per block
    Case(Lines, {"alpha": 0.3, "beta": 0.4}, alone=False, identical="other"),
    Case(LoraLego),  # as many units as one expert has
    Case(LoraLego, {"rank": 2}, alone=False, identical="other"),  # joins units
    # What is shared counts once, and is the base.
    Case(LoRe, {"steps": 2}, alone=False, identical="other", moves_base=True),
    # Rounding grows with the number of steps.
    Case(MaTs, lambda tasks: {**measured(tasks), "iterations": 15}, bound=40.0),
    Case(MagMax),
    Case(Mean),
    Case(Merged, {"rules": [TaskArithmetic()]}, identical="sum"),
    Case(Merged, {"rules": [Trim(0.3), ElectSign("mean")]}, alone=False, identical="other"),  # drops entries
    Case(MetaGpt, adds_up=True),
    Case(ModelStock),
    Case(ModelStock, {"per": "row"}),
    Case(MultiSlerp),
    Case(MultiSlerp, {"on": "task_vectors"}),
    Case(NearSwap, {"t": 0.05}, experts=2, ordered=True),  # the second into the first
    Case(NuSlerp, experts=2),
    Case(NuSlerp, {"weights": {"letters": 1.0, "digits": 3.0}, "per": "row"}, experts=2),
    Case(NuSlerp, {"per": "column", "on": "task_vectors"}, experts=2),
    Case(OneBit, alone=False, identical="other"),  # keeps signs
    Case(Opcm, identical="other", ordered=True, adds_up=True),  # what is in it already is left out
    Case(Opcm, {"rescale": False}, identical="other", ordered=True),
    Case(Pcb, {"keep": 0.3}, alone=False, identical="other"),  # drops entries
    Case(Prune, {"keep": 0.3}, alone=False, identical="other"),  # drops entries
    Case(Ram),
    Case(Ram, {"rescale": 0.1}),
    Case(Rebase, {"scale": 0.5}, identical="other", moves_base=True),  # its base is a merge
    Case(RegMean, measured, bound=40.0),  # a row answers few inputs, whatever it does to others
    Case(RegMean, lambda tasks: {**measured(tasks), "rho": 0.0}, bound=1.0),
    Case(RegMean, lambda tasks: {**measured(tasks), "relative": True}, bound=40.0),
    Case(RegMeanPlusPlus, measured, bound=40.0),
    Case(Sce, {"keep": 0.3}),
    Case(Sce, {"keep": 1.0}),
    Case(SensMerging, measured, alone=False, identical="other"),  # another factor per block
    Case(Slerp, experts=2),
    Case(Slerp, {"t": 0.3}, experts=2, ordered=True),  # from the first to the second
    Case(Star, alone=False, identical="other"),  # drops directions
    Case(Star, {"keep": 1.0}, identical="sum"),
    Case(Stf, identical="other"),  # keeps r/K directions of each
    Case(Store, {"dtype": "same", "place": "host"}, identical="sum"),
    Case(Store, alone=False, identical="other"),  # rounds
    Case(Store, {"dtype": "int8"}, alone=False, identical="other"),  # rounds
    # Matrices as the expert, what is none summed; a scale cancels.
    Case(Svc, identical="other", linear=False),
    Case(TallMask, identical="other", bound=0.0),  # each takes the sum; ±τ masks it all
    Case(TaskArithmetic, identical="sum"),
    Case(Trim, {"keep": 0.3}, alone=False, identical="other"),  # drops entries
    Case(Trim, {"keep": 0.3, "scope": "tensor"}, alone=False, identical="other"),  # drops entries
    Case(TruncatedSVD, {"rank": 0.5}, alone=False, identical="other"),  # drops directions
    Case(TsvM, identical="other"),  # keeps r/K directions of each
    Case(TsvM, {"outliers": 2.0}, identical="other"),
    Case(TsvM, {"matrices": Matrices(average="embed", convolutions=True)}, identical="other"),
    Case(Widen, identical="other"),  # adds up what is important
    Case(Wudi, {"steps": 20}, identical="other"),  # from the sum
    Case(Wudi, {"ridge": 0.1}, identical="other"),
]


def over(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[f"{case.rule.__name__}-{i}" for i, case in enumerate(cases)])


every_case = over(CASES)


#: Every class of `adamerge.rules` that goes into a list for `merge`.
EXPORTED = [
    member
    for member in (getattr(adamerge.rules, name) for name in adamerge.rules.__all__)
    if inspect.isclass(member) and issubclass(member, Transform | Rule | Correction) and not inspect.isabstract(member)
]


@pytest.mark.parametrize("rule", EXPORTED, ids=lambda rule: rule.__name__)
def test_every_exported_rule_has_an_entry(rule):
    known = {case.rule for case in CASES}
    assert rule in known, f"{rule.__name__} is exported from adamerge.rules but has no entry in CASES of {__file__}"
    assert rule.__doc__, f"{rule.__name__} has no docstring"


@every_case
def test_configurations_build_it(case):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(case.rule, "rule", fail_untyped=True)
    given = {name: asdict(value) if is_dataclass(value) else value for name, value in case.given().items()}
    built = parser.instantiate(parser.parse_object({"rule": given})).rule
    assert type(built) is case.rule


# -- models ------------------------------------------------------------------------------------------------------------


def state(seed: int, spread: float = 1.0, dtype: torch.dtype = torch.float64) -> State:
    """Noise of that spread in every parameter, besides the same frozen tensor for every seed."""
    rng = torch.Generator().manual_seed(seed)
    values = {name: spread * torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in SHAPES.items()}
    values["frozen"] = torch.linspace(-1, 1, 8, dtype=torch.float64) * (seed == 0)
    values["norm.running_mean"] = spread * torch.randn(6, generator=rng, dtype=torch.float64)
    values["norm.running_var"] = spread * torch.rand(6, generator=rng, dtype=torch.float64)
    values = {name: value.to(dtype) for name, value in values.items()}
    return {**values, "head.weight": values["embed.weight"], "norm.num_batches_tracked": torch.tensor(seed)}


def plus(base: State, change: State, factor: float = 1.0) -> State:
    """base + factor · change, with the same ties; integers are those of the change."""
    values = {n: v + factor * change[n] if v.is_floating_point() else change[n] for n, v in base.items()}
    return {**values, "head.weight": values["embed.weight"]}


def pool(tasks: Sequence[str] = TASKS, dtype: torch.dtype = torch.float64) -> tuple[State, dict[str, State]]:
    """A base and one expert per task near it, whose values are of that dtype."""
    base = state(0, dtype=dtype)
    return base, {task: plus(base, state(1 + TASKS.index(task), 0.1, dtype)) for task in tasks}


@functools.cache  # Building them takes longer than merging them, and no merge changes them.
def vectors(tasks: tuple[str, ...], dtype: torch.dtype = torch.float64) -> TaskVectors:
    """The task vectors of `pool`."""
    return TaskVectors.from_state_dicts(*pool(tasks, dtype))


def parameters(values: Mapping[str, Tensor]) -> State:
    return {n: v for n, v in values.items() if not n.startswith("norm.")}


def identical(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Same names, same dtypes, same bits."""
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


def assert_near(left: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float = 1e-11) -> None:
    for name, value in parameters(right).items():
        assert_close(left[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def merged_or_named(tv: TaskVectors, steps: list[Any]) -> State | None:
    """The merge, which is finite; or `None` for an InputError that names a tensor."""
    try:
        merged = merge(tv, rules=steps)
    except InputError as error:
        if not any(name in str(error) for name in tv.base):
            raise
        return None
    for name, value in merged.items():
        assert value.isfinite().all(), f"{name} is not finite"
    return merged


# -- limits ------------------------------------------------------------------------------------------------------------


@every_case
def test_scale_zero_is_the_base(case):
    tv = vectors(case.tasks)
    merged = merge(tv, rules=case.steps(), scale=0.0)
    assert identical(parameters(merged), parameters(tv.base)) != case.moves_base


@over([case for case in CASES if case.linear])
def test_the_merge_is_linear_in_the_scale(case):
    tv = vectors(case.tasks)
    none, half, whole = (merge(tv, rules=case.steps(case.tasks), scale=scale) for scale in (0.0, 0.5, 1.0))
    assert_near(half, {name: (none[name] + whole[name]) / 2 for name in parameters(none)})


@over([case for case in CASES if case.experts])
def test_another_number_of_experts_is_refused(case):
    tasks = TASKS[:1] if case.experts > 1 else TASKS[:2]
    with pytest.raises(InputError, match=f"{case.rule.__name__} .*{tasks[-1]}"):
        merge(vectors(tasks), rules=case.steps(tasks))


@over([case for case in CASES if not case.experts])
def test_one_expert(case):
    base, experts = pool(("digits",))
    tv = TaskVectors.from_state_dicts(base, experts)
    merged = merged_or_named(tv, case.steps(("digits",)))
    assert merged is not None
    if case.alone:
        assert_near(merged, experts["digits"])


@every_case
def test_identical_experts(case):
    base, experts = pool(("digits",))
    tv = TaskVectors.from_state_dicts(base, dict.fromkeys(case.tasks, experts["digits"]))
    merged = merged_or_named(tv, case.steps(case.tasks))
    assert merged is not None
    if case.identical == "expert":
        assert_near(merged, experts["digits"])
    elif case.identical == "sum":
        change = plus(experts["digits"], base, -1.0)
        assert_near(merged, plus(base, change, len(case.tasks)))


@every_case
def test_experts_that_are_the_base(case):
    base = state(0)
    with pytest.warns(UserWarning, match="identical to the base"):
        tv = TaskVectors.from_state_dicts(base, dict.fromkeys(case.tasks, base))
    merged = merged_or_named(tv, case.steps(case.tasks))
    if merged is not None and not case.scales_base:
        assert_near(merged, base)


@every_case
def test_one_expert_of_several_is_the_base(case):
    base, experts = pool(case.tasks)
    with pytest.warns(UserWarning, match="identical to the base"):
        tv = TaskVectors.from_state_dicts(base, {**experts, case.tasks[0]: base})
    assert merged_or_named(tv, case.steps(case.tasks)) is not None


@every_case
@pytest.mark.parametrize("origin", [0.0, 1.0], ids=["zero base", "base"])
def test_opposite_experts(case, origin):
    tasks = TASKS[: case.experts or 2]
    base, change = plus(state(0), state(0), origin - 1), state(1)
    experts = {task: plus(base, change, (-1.0) ** k) for k, task in enumerate(tasks)}
    merged = merged_or_named(TaskVectors.from_state_dicts(base, experts), case.steps(tasks))
    if merged is None or case.scales_base:
        return
    for name, value in parameters(merged).items():
        moved = (value - base[name]).abs().max()
        assert moved <= case.bound * change[name].abs().max() + 1e-12, f"{name} moved by {moved:.3g}"


@every_case
def test_a_zero_base(case):
    base = plus(state(0), state(0), -1.0)
    experts = {task: plus(base, state(seed)) for seed, task in enumerate(case.tasks, 1)}
    assert merged_or_named(TaskVectors.from_state_dicts(base, experts), case.steps(case.tasks)) is not None


# -- what must not matter ----------------------------------------------------------------------------------------------


@every_case
def test_the_order_of_the_experts(case):
    merges = [merge(vectors(order), rules=case.steps(order)) for order in itertools.permutations(case.tasks)]
    if case.ordered:
        assert not all(identical(other, merges[0]) for other in merges[1:]), "not ordered after all"
    else:
        for other in merges[1:]:
            assert_near(other, merges[0])


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(case, dtype):
    base, experts = pool(case.tasks, dtype)
    merged = merge(TaskVectors.from_state_dicts(base, experts), rules=case.steps(case.tasks))
    wide = [{n: v.double() if v.is_floating_point() else v for n, v in s.items()} for s in (base, *experts.values())]
    for values in wide:
        values["head.weight"] = values["embed.weight"]
    tv = TaskVectors.from_state_dicts(wide[0], dict(zip(experts, wide[1:], strict=True)))
    expected = merge(tv, rules=case.steps(case.tasks))
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    for name, value in merged.items():
        assert value.dtype == base[name].dtype
        assert value.shape == base[name].shape
        if value.is_floating_point():
            assert_close(value.double(), expected[name], rtol=tolerance, atol=tolerance)


@every_case
def test_a_rule_keeps_nothing_of_what_it_has_seen(case):
    steps, tv = case.steps(case.tasks), vectors(case.tasks)
    other = TaskVectors.from_state_dicts(state(7), {t: state(8 + k) for k, t in enumerate(case.tasks)})
    first = merge(tv, rules=steps)
    merge(other, rules=steps)
    assert identical(merge(tv, rules=steps), first)


@every_case
def test_arguments_are_not_changed_and_share_no_memory(case):
    base, experts = pool(case.tasks)
    kept = copy.deepcopy((base, experts))
    tv = TaskVectors.from_state_dicts(base, experts)
    deltas = {name: delta.clone() for name, delta in tv.deltas.items()}
    for scale in (0.0, 1.0):
        merged = merge(tv, rules=case.steps(case.tasks), scale=scale)
        inputs = {v.data_ptr() for s in (base, *experts.values(), tv.deltas) for v in s.values()}
        assert inputs.isdisjoint(v.data_ptr() for v in merged.values())
    assert identical(base, kept[0])
    assert all(identical(experts[task], kept[1][task]) for task in experts)
    assert identical(tv.deltas, deltas)


# -- the kinds of tensors ----------------------------------------------------------------------------------------------


@every_case
def test_ties_integers_and_statistics(case):
    base, experts = pool(case.tasks)
    merged = merge(TaskVectors.from_state_dicts(base, experts), rules=case.steps(case.tasks), scale=0.7)
    assert list(merged) == list(base)
    assert merged["head.weight"] is merged["embed.weight"]
    assert merged["norm.num_batches_tracked"] == 0
    assert merged["norm.num_batches_tracked"].dtype == torch.int64
    if not any(getattr(step, "keeps_statistics", False) for step in case.steps(case.tasks)):
        for name in ("norm.running_mean", "norm.running_var"):
            mean = sum(expert[name] for expert in experts.values()) / len(experts)
            assert_close(merged[name], mean, rtol=1e-14, atol=1e-14)


# -- streaming ---------------------------------------------------------------------------------------------------------


@every_case
def test_files_and_pieces_give_what_memory_gives(case, tmp_path, monkeypatch):
    base, experts = pool(case.tasks, torch.float32)
    untied = {name: {n: v for n, v in s.items() if n != "head.weight"} for name, s in {"base": base, **experts}.items()}
    for name, values in untied.items():
        save_file(values, tmp_path / f"{name}.safetensors")
    files = {task: tmp_path / f"{task}.safetensors" for task in experts}
    steps = case.steps(case.tasks)
    in_memory = TaskVectors.from_state_dicts(untied["base"], {task: untied[task] for task in experts})
    whole = merge(in_memory, rules=steps)
    monkeypatch.setattr("adamerge.differences.PIECE", 100)
    streamed = merge(TaskVectors.open(tmp_path / "base.safetensors", files), rules=steps)
    assert identical(streamed, merge(in_memory, rules=steps))
    if case.adds_up:
        assert_near(streamed, whole, 1e-6)
    else:
        assert identical(streamed, whole)
