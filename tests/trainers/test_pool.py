"""Pools of experts that are larger than, or other than, the tasks that are adapted on and scored."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_suite import TinySuite
from torch.testing import assert_close

from adamerge import InputError, read_coefficients
from adamerge.suites import Subset
from modules import Coefficients, Entropy, FeatureRouter, PseudoLabels, Surgery, TaskIdentity
from trainers.evaluation import reference_rows
from trainers.report import Report
from trainers.results import Results

POOL = {"three": "three", "one": "one", "two": "two"}


def subset(tasks, experts=None):
    return Subset(TinySuite(), tasks, experts)


def test_the_whole_of_a_suite_adapts_bit_for_bit_as_the_suite(adapt):
    plain, _ = adapt(suite=TinySuite())
    whole, _ = adapt(suite=Subset(TinySuite()))
    assert torch.equal(plain.coefficients(), whole.coefficients())


def test_an_expert_that_no_task_needs_has_coefficients_and_they_learn(adapt):
    run, _ = adapt(suite=subset(["one"], POOL))
    assert run.coefficients.tasks == ("three", "one", "two")
    assert bool((run.coefficients() != run.suite.scale).any(0).all())
    assert list(run.heads) == ["one"]


def test_results_and_coefficients_are_of_the_tasks_and_of_the_pool(adapt, tmp_path):
    adapt(suite=subset(["two", "one"], {"three": "three", "two": "two"}), callbacks=[Report()])
    rows = {row["method"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert list(rows.pop("experts")["accuracy"]) == ["two"]
    assert all(list(row["accuracy"]) == ["two", "one"] for row in rows.values())
    assert "task arithmetic 0.3" in rows
    assert read_coefficients(tmp_path / "coefficients.json").tasks == ("three", "two")
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"progress.png", "accuracy.png"}


def test_a_task_is_taught_by_its_own_expert_wherever_that_stands(adapt):
    kwargs = {"objective": PseudoLabels(), "coefficients": Coefficients("model", init=0.0)}
    one, _ = adapt(suite=subset(["one"], {"one": "one"}), steps=1, **kwargs)
    kwargs["coefficients"] = Coefficients("model", init=0.0)
    pool, _ = adapt(suite=subset(["one"], POOL), steps=1, **kwargs)
    image = torch.arange(4)
    assert_close(pool.known("expert", "one", {"index": image}), one.known("expert", "one", {"index": image}))


def test_a_router_finds_the_expert_of_a_task_by_its_place_in_the_pool(adapt):
    router = FeatureRouter(layers=0)
    parts = {"router": router, "objective": TaskIdentity(), "learn": ["router"], "task_id": "inferred"}
    optimizer = lambda params: torch.optim.Adam(params, lr=0.1)  # noqa: E731
    run, _ = adapt(60, suite=subset(["one"], POOL), optimizer=optimizer, **parts)
    images = run.suite.dataset("one", "test").batch(torch.arange(8))[0]
    run.eval()
    assert run.identify(images).tolist() == [0] * 8  # of the tasks, of which there is one
    assert bool(run.identified(images, "one").all())
    assert torch.equal(run.scored(images, "one")[:, :-1], run(images, "one"))
    assert bool((run.scored(images, "one")[:, -1] == -torch.inf).all())


def test_corrections_are_those_of_the_tasks(adapt):
    run, _ = adapt(suite=subset(["one"], {"two": "two"}), correction=Surgery(rank=2))
    assert list(run.correction.final) == ["one"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"objective": PseudoLabels()}, "PseudoLabels needs an expert of every task; 'one' has none among two"),
        ({"objective": TaskIdentity(), "router": FeatureRouter()}, "TaskIdentity needs an expert of every task"),
        ({"objective": Entropy(), "router": FeatureRouter(), "task_id": "inferred"}, "task 'one' has none"),
        ({"coefficients": Coefficients("model", init=[0.1, 0.2])}, "expected one number, 1 numbers"),
    ],
)
def test_what_a_task_without_an_expert_cannot_have_is_refused(adapt, kwargs, message):
    with pytest.raises(InputError, match=message):
        adapt(suite=subset(["one"], {"two": "two"}), **kwargs)


def test_a_task_without_an_expert_has_no_expert_to_be_compared_with():
    suite = subset(["one", "two"], {"two": "two", "three": "three"})
    rows = reference_rows(suite, {task: suite.dataset(task, "test") for task in suite.tasks})
    assert list(rows["experts"]) == ["two"]
    results = Results("tiny", suite.tasks, rows)
    assert results.normalised("base") == rows["base"]["two"] / rows["experts"]["two"]
    assert "| experts |  | " in results.markdown()
    alone = subset(["one"], {"two": "two"})
    assert "experts" not in reference_rows(alone, {"one": alone.dataset("one", "test")})


def test_a_file_takes_the_place_of_an_expert(tmp_path):
    whole = TinySuite().task_vectors()
    save_file(whole.expert("two"), tmp_path / "merged.safetensors")
    vectors = subset(["one"], {"one": "one", "other": str(tmp_path / "merged.safetensors")}).task_vectors()
    assert vectors.tasks == ("one", "other")
    for name, delta in vectors.deltas.items():
        assert_close(delta, whole.deltas[name][:2], msg=name)


def test_a_subset_of_a_task_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="suite tiny has no task 'cats'; it has one, two, three"):
        subset(["cats"])
