"""Methods ranked without labels: closed forms, the order, what is run and what is not, and that no label is read."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_compare import leave
from tiny_suite import TinySuite
from torch.testing import assert_close

from adamerge.objectives import js
from benchmarks.criteria import Model, correlations, main
from modules import Coefficients, FeatureRouter, Head
from trainers import Adaptation, cli, plans, recommend
from trainers.compare_runs import Record, Run
from trainers.evaluation import accuracy
from trainers.judging import Judge
from trainers.ranking import MEASURED, Candidate, Ranking
from trainers.recommend import Plan

HERE = Path(__file__).parent
GIVEN = ["--suite", "suite.yaml", "--config", "common.yaml", "--output", "out", "--steps", "2", "--methods"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a suite that has no labels, two methods and one that cannot be built."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    texts = {
        "suite": "model: {init_args: {suite: {class_path: tiny_suite.Unlabelled}}}\n",
        "common": "data: {init_args: {batch_size: 4}}\ntrainer: {accelerator: cpu}\n",
        "tensor": "# One per tensor (layer-wise).\nmodel: {init_args: {coefficients: {init_args: {grain: tensor}}}}\n",
        "broken": "model: {init_args: {coefficients: {init_args: {grain: nothing}}}}\n",
    }
    for name, text in texts.items():
        Path(f"{name}.yaml").write_text(text)
    return tmp_path


def candidate(name: str, value: float, adapts: bool = True, **more) -> Candidate:
    return Candidate(name, adapts, {"agreement": {"one": value + 0.1, "two": value - 0.1}}, **more)


# -- what unlabelled images say ----------------------------------------------------------------------------------------


@pytest.fixture
def judge(suite) -> Judge:
    return Judge(suite, images=20)


def test_experts_agree_with_themselves(judge, suite):
    own = {task: (logits, logits) for task, logits in judge._experts.items()}
    found = judge.criteria(own, own)
    for name in ("agreement", "likeness", "stability"):
        assert_close(list(found[name].values()), [1.0] * 3)
    task, images = "one", judge._images["one"]
    model = suite.backbone()
    model.load_state_dict(dict(suite.task_vectors().expert(task)))
    assert_close(judge._experts[task], Head(suite.head(task))(model(images)).detach())


def test_criteria_are_means_of_two_runs_and_stability_is_between_them(judge):
    first = {task: (logits, logits) for task, logits in judge._experts.items()}
    second = {task: (-logits, -logits) for task, (logits, _) in first.items()}
    found = judge.criteria(first, second)
    for task, (logits, _) in first.items():
        assert found["agreement"][task] == 0.5
        assert found["stability"][task] == 0
        assert found["likeness"][task] == pytest.approx(1 - float(js(-logits, logits).mean()) / math.log(2) / 2)


def test_a_merge_without_adaptation_is_what_coefficients_begin_with(judge):
    run = Adaptation(TinySuite(), Coefficients("model", init=0.3))
    run.configure_model()
    asked, static = judge.ask(run), judge.ask_static()
    assert list(static) == ["mean", "task arithmetic 0.3"]
    for task in judge.suite.tasks:
        assert_close(asked[task][0], static["task arithmetic 0.3"][task][0])
        assert (asked[task][0] - static["mean"][task][0]).abs().max() > 1e-3


def test_an_image_taken_to_be_of_another_task_does_not_agree(judge):
    """With the task inferred, one task at most can be that of an image."""
    run = Adaptation(TinySuite(), Coefficients("model"), router=FeatureRouter(), task_id="inferred")
    run.configure_model()
    answers = judge.ask(run)
    found = judge.criteria(answers, answers)
    for task, images in judge._images.items():
        own = run.identified(images, task)
        logits, _ = answers[task]
        same = (logits.argmax(1) == judge._experts[task].argmax(1)) & own
        assert found["agreement"][task] == pytest.approx(float(same.float().mean()))
        assert math.isfinite(found["certainty"][task])


def test_agreement_is_accuracy_by_the_experts_labels(judge):
    run = Adaptation(TinySuite(), Coefficients("model"))
    run.configure_model()
    answers = judge.ask(run)
    labelled = {
        task: torch.utils.data.TensorDataset(images, judge._experts[task].argmax(1))
        for task, images in judge._images.items()
    }
    assert_close(judge.criteria(answers, answers)["agreement"], accuracy(run.scored, labelled))


# -- the order ---------------------------------------------------------------------------------------------------------


def test_the_best_come_first_and_failures_last():
    found = [candidate("mean", 0.5, False), Candidate("A", True, error="no"), candidate("B", 0.7), candidate("C", 0.4)]
    ranking = Ranking.of([*found, candidate("D", math.nan)], "tiny")
    assert [each.name for each in ranking.candidates] == ["B", "mean", "C", "D", "A"]
    assert ranking.failures == ["A: no"]
    assert "Recommended: B; its classes are those of the experts for 70.0 %" in ranking.verdict()
    assert "those of the best merge without adaptation (mean) for 50.0 %" in ranking.verdict()
    assert ranking.verdict().endswith(MEASURED)


def test_not_adapting_wins_and_wins_a_tie():
    for other in (0.4, 0.5):
        ranking = Ranking.of([candidate("mean", 0.5, False), candidate("A", other)], "tiny")
        assert "Recommended: no adaptation (mean); " in ranking.verdict()


def test_nothing_is_recommended_without_results():
    ranking = Ranking.of([Candidate("A", True, error="no")], "tiny", "the command")
    assert "Nothing can be recommended" in ranking.markdown()
    assert "- A: no" in ranking.markdown()
    ranking.show()


def test_the_report_has_every_criterion_and_task():
    text = Ranking.of([candidate("A", 0.5, told=("teacher",))], "tiny", "the command").markdown()
    assert "| A | 50.0 | teacher |" in text
    assert "| A | 60.0 | 40.0 |" in text
    assert "```bash\nthe command\n```" in text


# -- what is run -------------------------------------------------------------------------------------------------------


def test_a_plan_has_two_halves_of_every_method():
    plan = Plan([*GIVEN, "tensor.yaml", "--seed", "3", "--", "--report.scores", "true"])
    assert [str(run.folder) for run in plan.runs] == ["out/runs/half0/tensor/seed3", "out/runs/half1/tensor/seed3"]
    words = " ".join(plan.runs[1].arguments)
    assert words.endswith(
        "--report.scores true --trainer.max_steps 2 --trainer.limit_val_batches 0 --report.scores false "
        "--report.figures false --data.init_args.half 1 --name tensor/seed3"
    )
    assert plan.title(plan.runs[1]) == "One per tensor, half1"
    assert "--report.scores false" in " ".join(plan.preparation(3).arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--suite suite.yaml --methods nothing.yaml", r"no such file: nothing\.yaml"),
        ("--suite suite.yaml --methods tensor.yaml --seed -1", "a seed is a number from 0 on"),
        ("--suite suite.yaml --methods tensor.yaml --steps 0", "steps are one or more: got 0 and 0"),
        ("--suite suite.yaml --methods tensor.yaml --seeds 1", "there is no argument --seeds"),
    ],
)
def test_bad_input_ends_in_one_sentence_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        recommend.main(arguments.split())
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not Path("runs").exists()


def test_without_a_run_there_are_only_reasons(monkeypatch, capsys):
    def fail(run):
        leave(run, "killed by SIGKILL")
        return run.record()

    monkeypatch.setattr(plans, "execute", fail)
    with pytest.raises(SystemExit) as stopped:
        recommend.main([*GIVEN, "tensor.yaml"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "One per tensor: killed by SIGKILL (out/runs/half0/tensor/seed0/log.txt)" in out
    assert "Nothing can be recommended" in out


def in_this_process(run: Run) -> Record:
    """As `execute`, which the tests of `trainers.compare` run with real children."""
    record = run.start()
    try:
        cli.main(run.command()[2:])
    except SystemExit:
        return run.write(replace(record, error="cannot be built"))
    return run.write(replace(record, error=None, seconds=1.0))


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_methods_are_ranked_and_no_label_is_read(monkeypatch, capsys):
    """On a suite whose labels raise: one method fails, the other is ranked, nothing is repeated."""
    monkeypatch.setattr(plans, "execute", in_this_process)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stopped:
        recommend.main([*GIVEN, "broken.yaml", "tensor.yaml"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "3/4 One per tensor, half0: 1 s, 0.0 GB" in out
    assert "broken: cannot be built (out/runs/half0/broken/seed0/log.txt)" in out
    found = json.loads(Path("out/recommend.json").read_text())
    names = [each["name"] for each in found["candidates"]]
    assert sorted(names[:3]) == ["One per tensor", "mean", "task arithmetic 0.3"]
    assert names[3] == "broken"
    assert set(found["candidates"][0]["criteria"]["stability"]) == {"one", "two", "three"}
    halves = [json.loads(Path(f"out/runs/half{half}/tensor/seed0/results.json").read_text()) for half in (0, 1)]
    assert [(half["rows"], half["steps"], half["stream"]["half"]) for half in halves] == [([], 2, 0), ([], 2, 1)]

    monkeypatch.setattr(plans, "execute", lambda run: pytest.fail("a run was repeated"))
    with pytest.raises(SystemExit) as stopped:
        recommend.main([*GIVEN, "tensor.yaml"])
    assert stopped.value.code == 0
    assert "2 of 2 runs are there already" in capsys.readouterr().out

    main([str(finished())])
    out = capsys.readouterr().out
    assert "seed0: 3 models" in out
    assert "stability" not in out

    Path("out/runs/half1/tensor/seed0/checkpoints/last.ckpt").write_bytes(b"torn")
    with pytest.raises(SystemExit) as stopped:
        recommend.main([*GIVEN, "tensor.yaml"])
    assert stopped.value.code == 1
    assert "One per tensor: InputError" in capsys.readouterr().out
    assert "Recommended: no adaptation" in Path("out/recommend.md").read_text()


# -- whether it is right -----------------------------------------------------------------------------------------------


def test_correlations_are_of_ranks_on_average_and_within_tasks():
    def model(one: float, two: float, accuracy: tuple[float, float]) -> Model:
        return {"agreement": {"one": one, "two": two}}, dict(zip(("one", "two"), accuracy, strict=True))

    found = [model(0.1, 0.9, (0.1, 0.2)), model(0.2, 0.85, (0.2, 0.3)), model(0.9, 0.8, (0.3, 0.4))]
    average, within = correlations(found)["agreement"]
    assert average == pytest.approx(1, abs=1e-5)
    assert within == pytest.approx(0, abs=1e-5), "one task in order, the other in reverse"


def test_a_comparison_without_a_finished_run_is_refused():
    with pytest.raises(SystemExit, match="no finished run under nowhere/runs"):
        main(["nowhere"])


def finished() -> Path:
    """A run as `trainers.compare` leaves it, beside an attempt that was moved aside."""
    folder = Path("finished/runs/tensor/seed0")
    shutil.copytree("out/runs/half0/tensor/seed0", folder)
    accuracy = {"this run, adapted": 0.9, "mean": 0.5, "task arithmetic 0.3": 0.4}
    rows = [{"method": name, "accuracy": {"one": value, "two": 0.5, "three": 0.5}} for name, value in accuracy.items()]
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    shutil.copytree(folder, f"{folder}.17")
    return Path("finished")
