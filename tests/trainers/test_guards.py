"""Guards: what they say of a run that collapses, and what such a run ends with."""

import json
import logging
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_suite import TinySuite

from adamerge import InputError
from adamerge.watching import evaluating
from modules import BlockRouter, Coefficients, Entropy, Objective, PseudoLabels, RepresentationL1, Surgery
from trainers import Adaptation, Stream
from trainers.cli import main
from trainers.guards import Guard
from trainers.phases import Phase
from trainers.report import Report, information

ROOT = Path(__file__).resolve().parents[2]
EXISTS = "ignore:Checkpoint directory .* exists and is not empty"
FAST = partial(torch.optim.SGD, lr=3.0)


class FirstClass(Objective):
    """Everything is of the first class."""

    def forward(self, view):
        return F.cross_entropy(view.logits, torch.zeros(len(view.logits), dtype=torch.int64), reduction="none")


def collapsing(**kwargs) -> dict:
    return {"learn": ["heads"], "objective": FirstClass(), "optimizer": FAST, **kwargs}


def learned(module: Adaptation) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.learned()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# -- what it says ------------------------------------------------------------------------------------------------------


def test_one_class_is_named_once(adapt, caplog):
    adapt(steps=12, callbacks=[Guard(every=4)], **collapsing())
    said = warnings_of(caplog)
    assert sorted(line.split(":")[0] for line in said) == ["one", "three", "two"]
    assert all(line.endswith(" % of the stream is predicted as class a since step 4") for line in said)


def test_what_ends_and_comes_again_is_said_again(caplog):
    guard = Guard()
    for step, wrong in [(5, True), (10, True), (15, False), (20, True)]:
        guard._one_class = lambda *_, wrong=wrong: {"class one": "one: bad"} if wrong else {}
        guard._at_bounds = lambda _: {}
        guard._look(type("T", (), {"global_step": step}), None)
    assert warnings_of(caplog) == ["one: bad since step 0", "one: bad since step 15"]


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"coefficients": Coefficients(bound="clamp", init=0.0)}, ["100 % of the coefficients are at a bound"]),
        ({"coefficients": Coefficients(bound="clamp", init=0.5)}, []),
        ({"coefficients": Coefficients(bound="clamp", init=0.0), "learn": ["heads"]}, []),
    ],
    ids=["at a bound", "inside", "at a bound by choice"],
)
def test_coefficients_that_learn_and_are_at_a_bound(adapt, caplog, kwargs, said):
    guard = Guard(every=2, one_class=1.1)
    adapt(steps=2, callbacks=[guard], optimizer=partial(torch.optim.SGD, lr=1e-9), **kwargs)
    assert warnings_of(caplog) == [f"{line} since step 0" for line in said]


@pytest.mark.parametrize("keep", ["agreement", "information"])
def test_a_fall_below_the_start_is_said_of_its_task(adapt, caplog, keep):
    adapt(steps=8, callbacks=[guard := Guard(every=4, keep=keep, one_class=1.1)], **collapsing())
    said = warnings_of(caplog)
    assert said
    words = {"agreement": "agreement with the expert", "information": "information on the class"}[keep]
    for line in said:
        task = line.split(":")[0]
        assert line.startswith(f"{task}: {words} fell from {guard.seen.start[task]:.2f} to ")


def test_an_objective_without_logits_is_watched_too(adapt):
    adapt(steps=2, callbacks=[guard := Guard(every=1, keep="information")], objective=RepresentationL1(),
          suite=TinySuite(vit=True), correction=Surgery(rank=2))  # fmt: skip
    assert list(guard.seen.scores) == [0, 1, 2]


# -- what the run ends with --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["agreement", "information"])
def test_a_run_that_only_got_worse_ends_with_its_start(adapt, keep):
    module, _ = adapt(steps=8, callbacks=[guard := Guard(every=4, keep=keep)], **collapsing())
    start = Adaptation(TinySuite(), **collapsing())
    start.configure_model()
    assert guard.seen.best_step == 0
    assert same(learned(module), learned(start))


def test_entropy_alone_collapses_on_tiny_data_and_a_guarded_run_does_not(adapt, caplog):
    def run(*guards):
        torch.manual_seed(0)
        module, _ = adapt(steps=40, callbacks=guards, learn=["heads"], objective=Entropy(), optimizer=FAST)
        images = {task: module.suite.dataset(task, "test").batch(torch.arange(23))[0] for task in module.suite.tasks}
        return {task: module(x, task).argmax(1) for task, x in images.items()}

    assert any(len(classes.unique()) == 1 for classes in run().values())
    assert all(len(classes.unique()) > 1 for classes in run(Guard(every=5, keep="information")).values())
    assert any("of the stream is predicted as class" in line for line in warnings_of(caplog))


def test_it_ends_with_the_best_snapshot_of_the_very_run_that_it_watches(adapt):
    kwargs = {"optimizer": partial(torch.optim.Adam, lr=0.3), "stream": Stream(2)}
    module, _ = adapt(steps=13, callbacks=[guard := Guard(every=2, keep="agreement", images=8)], **kwargs)
    assert list(guard.seen.scores) == [0, 2, 4, 6, 8, 10, 12, 13]
    best = guard.seen.best_step
    assert 0 < best < 13
    assert guard.seen.scores[best] == max(guard.seen.scores.values())
    plain, _ = adapt(steps=best, **kwargs)
    whole, _ = adapt(steps=13, **kwargs)
    assert same(learned(module), learned(plain))
    assert same(guard.seen.left, learned(whole))


def test_the_images_are_of_the_stream_and_always_the_same(adapt):
    seen = []
    guard = Guard(every=1, keep="information", images=7)
    images = guard._images
    guard._images = lambda trainer: (
        (task, seen.append((task, x := list(parts))) or x) for task, parts in images(trainer)
    )
    _, trainer = adapt(steps=1, callbacks=[guard], stream=Stream(4, held_out=0.5, eval_batch_size=3))
    start, end = seen[:3], seen[3:]
    for (task, before), (_, after) in zip(start, end, strict=True):
        adapted = trainer.datamodule.steps().datasets[task]
        pool = adapted.batch(torch.arange(len(adapted)))[0]
        assert [len(x) for x in before] == [3, 3, 1]
        assert torch.equal(torch.cat(before), torch.cat(after))
        assert all((image == pool).flatten(1).all(1).any() for image in torch.cat(before))


def test_modes_are_as_before():
    module = Adaptation(TinySuite(vit=True), router=BlockRouter(), learn=["coefficients"])
    module.configure_model()
    module.train()
    module.router.eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
    assert (module.training, module.router.training) == (True, False)


# -- runs that stop, and that go on ------------------------------------------------------------------------------------


def test_a_run_stops_at_the_first_thing_that_is_wrong(adapt, tmp_path):
    _, trainer = adapt(steps=40, callbacks=[Guard(every=4, stop=True)], **collapsing())
    assert trainer.global_step == 8
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    _, again = adapt(
        steps=40, callbacks=[Guard(every=4, stop=True)], ckpt_path=str(tmp_path / "end.ckpt"), **collapsing()
    )
    assert again.global_step == 8


@pytest.mark.filterwarnings(EXISTS)
@pytest.mark.parametrize("end", [5, 6])
def test_a_run_that_was_interrupted_ends_as_an_undisturbed_one(adapt, tmp_path, end):
    def guard():
        return Guard(every=3, keep="agreement", images=8)

    kwargs = {"optimizer": partial(torch.optim.Adam, lr=0.3), "stream": Stream(2)}
    module, _ = adapt(steps=13, callbacks=[whole := guard()], **kwargs)

    def keeping():
        return ModelCheckpoint(tmp_path / "kept", every_n_train_steps=end, save_top_k=-1, filename="{step}")

    adapt(steps=13, callbacks=[guard(), keeping()], **kwargs)
    again, _ = adapt(
        steps=13, callbacks=[resumed := guard(), keeping()], ckpt_path=str(tmp_path / f"kept/step={end}.ckpt"), **kwargs
    )
    assert same(learned(again), learned(module))
    assert same(resumed.seen.left, whole.seen.left)
    assert resumed.seen.scores == whole.seen.scores


def test_a_run_that_is_made_longer_goes_on_from_where_it_was(adapt, tmp_path):
    def guard():
        return Guard(every=4, keep="agreement")

    whole, _ = adapt(steps=12, **collapsing())
    _, trainer = adapt(steps=8, callbacks=[first := guard()], **collapsing())
    assert first.seen.left
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    adapt(steps=12, callbacks=[longer := guard()], ckpt_path=str(tmp_path / "end.ckpt"), **collapsing())
    assert same(longer.seen.left, learned(whole))


# -- what it is told, and what it leaves -------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "teacher"), [(None, False), ("information", False), ("agreement", True)])
def test_asking_the_experts_is_part_of_the_budget(adapt, tmp_path, keep, teacher):
    module, trainer = adapt(steps=1, callbacks=[Guard(keep=keep), Report(references=False, figures=False)])
    assert ("teacher" in information(module, trainer.datamodule)) == teacher
    results = json.loads((tmp_path / "results.json").read_text())
    assert ("teacher" in results["information"]) == teacher
    assert results["guards"][0].get("keep") == keep


def test_results_are_of_what_the_run_ends_with(adapt, tmp_path):
    adapt(steps=8, callbacks=[Guard(every=4, keep="agreement"), Report(references=False)], **collapsing())
    results = json.loads((tmp_path / "results.json").read_text())
    start, adapted = (row["accuracy"] for row in results["rows"])
    assert start == adapted
    assert results["guards"][0]["ended_with_step"] == 0


@pytest.mark.parametrize("kwargs", [{"every": 0}, {"images": 1}])
def test_sizes_that_make_no_sense_are_refused(kwargs):
    with pytest.raises(InputError, match="looks every 1 or more steps, at 2 or more images"):
        Guard(**kwargs)


def test_phases_are_compared_by_one_criterion(adapt):
    phases = [Phase(Entropy(), ["coefficients"], 0.5), Phase(PseudoLabels(), ["heads"])]
    adapt(steps=4, callbacks=[guard := Guard(every=1, keep="agreement")], phases=phases, coefficients=Coefficients())
    assert list(guard.seen.scores) == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_a_stream_that_makes_entropy_collapse_the_robust_overlay_keeps_what_there_was(tmp_path, monkeypatch):
    """Suite Mini, a single image per task and step, large steps: within half a point of the better of start and end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = ["--data.init_args.batch_size=1", "--model.init_args.learning_rates.coefficients=0.1"]
    arguments += ["--trainer.max_steps=50"]
    rows = {}
    for method in ("adamerging", "robust"):
        configs = [f"--config={ROOT}/configs/{name}.yaml" for name in ("suites/mini", f"methods/{method}")]
        main(["fit", *configs, *arguments, "--report.references=false", "--report.figures=false", f"--name={method}"])
        results = json.loads((tmp_path / f"runs/{method}/results.json").read_text())
        rows[method] = {row["method"].split(", ")[1]: row["average"] for row in results["rows"]}
    assert rows["adamerging"]["adapted"] < rows["adamerging"]["start"] - 0.02
    assert rows["robust"]["adapted"] >= max(rows["adamerging"].values()) - 0.005
