"""What a run says of itself: what it learns, from what, and what it leaves behind."""

import json
import logging

import pytest
from tiny_suite import TinySuite, Unlabelled

from adamerge import InputError
from adamerge.rules import Merged, RegMean, SensMerging
from modules import (
    BlockRouter,
    Coefficients,
    Entropy,
    FeatureRouter,
    Objective,
    PseudoLabels,
    RepresentationL1,
    Sum,
    Supervised,
    Surgery,
    TaskIdentity,
)
from trainers import Adaptation, Joint, Static, Stream
from trainers.phases import Phase
from trainers.report import Report, budget, information

ALWAYS = {"images", "task id"}
#: By method: its arguments, the stream's, the information, and the sentence.
METHODS = {
    "adamerging": (
        lambda: {"coefficients": Coefficients("model")}, {}, ALWAYS,
        "Learns 3 numbers (3 of the coefficients) from: images, the task of each image; no labels",
    ),
    "columns of some tensors": (
        lambda: {"coefficients": Coefficients("column", only=r"attn\.proj")}, {}, ALWAYS,
        "Learns 54 numbers (54 of the coefficients) from: images, the task of each image; no labels",
    ),
    "surgery": (
        lambda: {
            "coefficients": Coefficients("model"), "correction": Surgery(rank=2),
            "phases": [Phase(Entropy(), ["coefficients"], 0.5), Phase(RepresentationL1(), ["correction"])],
        },
        {}, ALWAYS | {"teacher"},
        "Learns 99 numbers (3 of the coefficients, 96 of the correction) from: "
        "images, the task of each image, the experts' outputs; no labels",
    ),
    "tint": (
        lambda: {"learn": ["heads"], "objective": PseudoLabels()}, {}, ALWAYS | {"teacher"},
        "Learns 64 numbers (64 of the heads) from: images, the task of each image, the experts' outputs; no labels",
    ),
    "constant routers": (
        lambda: {"router": BlockRouter(depth=0), "learn": ["router"]}, {}, ALWAYS,
        "Learns 6 numbers (6 of the router) from: images, the task of each image; no labels",
    ),
    "twin": (
        lambda: {"router": FeatureRouter(layers=0), "learn": ["router"], "objective": TaskIdentity()},
        {"train_split": "train"}, ALWAYS | {"train data"},
        "Learns 43 numbers (43 of the router) from: images, the task of each image, training data; no labels",
    ),
    "supervised": (
        lambda: {
            "coefficients": Coefficients("model"), "allow_labels": True, "objective": Sum([Entropy(), Supervised()]),
        },
        {}, ALWAYS | {"labels"},
        "Learns 3 numbers (3 of the coefficients) from: images, labels, the task of each image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_run_says_what_it_learns_and_from_what(name):
    method, stream, sees, sentence = METHODS[name]
    module = Adaptation(TinySuite(vit=True), **method())
    module.configure_model()
    assert information(module, Stream(**stream)) == sees
    assert budget(module, Stream(**stream)) == sentence


def test_what_transforms_measure_is_told(tmp_path):
    def told(*rules, **given):
        return information(Adaptation(TinySuite(vit=True), transforms=rules, **given), Stream())

    assert told(Merged([RegMean()]), program=Static()) == {"train data"}
    assert told(SensMerging()) == ALWAYS | {"train data", "labels"}
    assert told(Merged([RegMean(tmp_path)]), program=Static()) == set(), "measured elsewhere"


def test_the_budget_is_logged_and_written(adapt, tmp_path, caplog):
    caplog.set_level(logging.INFO, "trainers.report")
    adapt(steps=2, callbacks=[Report(references=False, figures=False)], objective=PseudoLabels())
    assert "from: images, the task of each image, the experts' outputs; no labels" in caplog.text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["information"] == ["images", "task id", "teacher"]


@pytest.mark.parametrize(("program", "learned", "timed"), [(Static, 0, False), (Joint, 3, True)])
def test_a_step_has_a_time_where_it_learns(adapt, tmp_path, program, learned, timed):
    report = Report(references=False, figures=False)
    adapt(steps=1, callbacks=[report], coefficients=Coefficients("model"), program=program())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["learned_parameters"] == learned
    assert (results["seconds_per_step"] is not None) == timed


@pytest.mark.parametrize(
    "how",
    [
        lambda: {"objective": Supervised()},
        lambda: {"objective": Sum([Entropy(), Supervised()])},
        lambda: {"phases": [Phase(Entropy(), share=0.5), Phase(Supervised())]},
    ],
    ids=["alone", "in a sum", "in a later phase"],
)
def test_labels_are_refused_before_any_work(adapt, monkeypatch, how):
    monkeypatch.setattr(TinySuite, "prepare", lambda self, fine_tune: pytest.fail("work started"))
    with pytest.raises(InputError, match="needs labels; set allow_labels to let it see them"):
        adapt(steps=2, **how())


def test_permission_alone_is_no_use_of_labels(adapt):
    module, _ = adapt(steps=1, allow_labels=True)
    assert "labels" not in information(module, Stream())


def test_an_objective_that_does_not_say_what_it_needs_does_not_get_it(adapt):
    class Secretive(Objective):
        def __init__(self, look) -> None:
            super().__init__()
            self.look = look

        def forward(self, view):
            return self.look(view)

    with pytest.raises(InputError, match="this stream has no labels"):
        adapt(steps=1, objective=Secretive(lambda view: view.labels))
    with pytest.raises(InputError, match="must declare that it needs a teacher"):
        adapt(steps=1, objective=Secretive(lambda view: view.teacher.logits))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_its_results_and_figures(adapt, tmp_path, name, suite):
    method, stream, *_ = METHODS[name]
    module = Adaptation(TinySuite(vit=True), **method())
    adapt(steps=4, module=module, callbacks=[Report(every=1)], stream=Stream(4, tasks_per_step=1, **stream))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["learned_parameters"] == sum(p.numel() for _, p in module.learned())
    assert results["method"]["phases"][-1]["objective"]["name"] == type(module.phases[-1].objective).__name__
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"progress.png", "accuracy.png"} <= figures
    assert ("coefficients.png" in figures) == (
        name in ("adamerging", "columns of some tensors", "surgery", "supervised")
    )


def test_a_resumed_run_that_is_done_already_reports_all_the_same(adapt, tmp_path):
    def report():
        return Report(references=False, figures=False)

    _, trainer = adapt(steps=3, callbacks=[report()])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (tmp_path / "results.json").unlink()
    adapt(steps=3, callbacks=[report()], ckpt_path=str(tmp_path / "end.ckpt"))
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 3


def test_stored_numbers_are_those_of_the_merge_its_router_and_its_correction():
    plain, routed, corrected = (
        Adaptation(TinySuite(vit=True), **kwargs)
        for kwargs in ({}, {"router": BlockRouter(depth=0)}, {"correction": Surgery(rank=2)})
    )
    for module in (plain, routed, corrected):
        module.configure_model()
    backbone = sum(p.numel() for p in plain.suite.backbone().parameters())
    mlps = sum(p.numel() for n, p in plain.suite.backbone().named_parameters() if ".mlp." in n)
    assert plain.stored_parameters() == backbone
    assert routed.stored_parameters() == backbone + 3 * mlps + 6
    assert corrected.stored_parameters() == backbone + 3 * 2 * 2 * 8


def test_a_run_without_scores_reads_no_label_and_draws_what_there_is(adapt, tmp_path):
    """The accuracies that are missing leave an empty table, and figures of loss and coefficients."""
    adapt(steps=2, callbacks=[Report(scores=False)], suite=Unlabelled())
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["rows"], found["steps"]) == ([], 2)
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"coefficients", "coefficients_over_steps", "progress"}
