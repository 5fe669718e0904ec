"""Methods side by side: what is run and what is not, how runs are gathered, and what a reader gets."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from trainers import compare, compare_figures, plans
from trainers.compare import Plan
from trainers.compare_runs import STOPPED, Record, Run, execute, reason, wait
from trainers.comparison import BEST, Comparison, Outcome

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GIVEN = ["--suite", "suite.yaml", "--config", "common.yaml", "--output", "out", "--methods"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a suite, two methods and one that cannot be built."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    texts = {
        "suite": "model: {init_args: {suite: {class_path: tiny_suite.TinySuite}}}\n",
        "common": "data: {init_args: {batch_size: 4}}\ntrainer: {accelerator: cpu, max_steps: 3}\n",
        "tensor": "# One per tensor (layer-wise).\nmodel: {init_args: {coefficients: {init_args: {grain: tensor}}}}\n",
        "task_wise": "model: {init_args: {coefficients: {init_args: {grain: model}}}}\n",
        "broken": "model: {init_args: {coefficients: {init_args: {grain: nothing}}}}\n",
    }
    for name, text in texts.items():
        Path(f"{name}.yaml").write_text(text)
    return tmp_path


def results(average: float = 0.7, scale: str = "0.3", tasks=("one", "two"), **more) -> dict:
    """What a run leaves, with accuracies right above and below an average."""

    def row(method: str, middle: float) -> dict:
        accuracy = {task: middle + (0.1 if i % 2 else -0.1) for i, task in enumerate(tasks)}
        return {"method": method, "accuracy": accuracy, "average": middle, "normalised": middle / 0.9}

    rows = [row("base", 0.4), row("experts", 0.9), row(f"task arithmetic {scale} (oracle)", 0.5)]
    rows += [row("this run, start", 0.45), row("this run, adapted", average)]
    if "given" in more:
        rows.append(row("this run, task given", more.pop("given")))
    return {"suite": "tiny", "rows": rows, "learned_parameters": 12, "versions": {"torch": "2"}, **more}


def row_of(comparison: Comparison, label: str):
    return next(row for row in comparison.rows if row.label == label)


def leave(run: Run, error: str | None = None, **content) -> None:
    """The folder of a run that was made before."""
    run.folder.mkdir(parents=True)
    record = Record(run.key(), error, 2.0, 1.5)
    (run.folder / "run.json").write_text(json.dumps(asdict(record)))
    if content:
        (run.folder / "results.json").write_text(json.dumps(content))


# -- what is asked for -------------------------------------------------------------------------------------------------


def test_a_plan_names_every_run_and_what_comes_last_wins():
    plan = Plan([*GIVEN, "tensor.yaml", "task_wise.yaml", "--seeds", "3", "5", "--", "--trainer.max_steps", "7"])
    assert plan.titles == {"tensor": "One per tensor", "task_wise": "task_wise"}
    assert [(run.seed, run.method) for run in plan.runs] == list(itertools.product((3, 5), ("tensor", "task_wise")))
    words = " ".join(plan.runs[0].arguments)
    assert words == (
        "--config common.yaml --config tensor.yaml --config suite.yaml --seed_everything 3 --data.init_args.seed 3 "
        "--model.init_args.suite.init_args.seed 3 --trainer.max_steps 7 --name tensor/seed3"
    )
    command = plan.runs[0].command()
    assert command[1] == str(ROOT / "train.py")
    assert command[-2:] == ["--root", "out/runs"]


def test_only_a_suite_with_a_seed_gets_one():
    Path("suite.yaml").write_text("model: {init_args: {suite: adamerge.suites.Local}}\n")
    plan = Plan([*GIVEN, "tensor.yaml", "--seeds", "0", "1"])
    assert "--model.init_args.suite.init_args.seed" not in plan.runs[1].arguments
    assert plan.preparation(0) == plan.preparation(1)


def test_a_title_that_two_share_has_the_file_s_name_added():
    Path("task_wise.yaml").write_text("# One per tensor: no\n")
    titles = Plan([*GIVEN, "tensor.yaml", "task_wise.yaml"]).titles
    assert titles == {"tensor": "One per tensor (tensor)", "task_wise": "One per tensor (task_wise)"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--suite suite.yaml --methods nothing.yaml", r"no such file: nothing\.yaml"),
        ("--suite nowhere.yaml --methods tensor.yaml", r"no such file: nowhere\.yaml$"),
        ("--suite suit.yaml --methods tensor.yaml", r"no such file: suit\.yaml: did you mean 'suite\.yaml'\?"),
        ("--suite suite.yaml --methods tensor.yaml --config no.yaml", r"no such file: no\.yaml"),
        ("--suite suite.yaml", "required: --methods"),
        ("--suite suite.yaml --methods", "--methods: expected at least one"),
        ("--methods tensor.yaml", "required: --suite"),
        ("--suite suite.yaml --methods tensor.yaml ./tensor.yaml", "two methods' files have the same name"),
        ("--suite common.yaml --methods tensor.yaml", r"common\.yaml names no suite .*KeyError: 'model'"),
        ("--suite torn.yaml --methods tensor.yaml", r"torn\.yaml names no suite"),
        ("--suite away.yaml --methods tensor.yaml", r"away\.yaml names no suite .*No module named 'nowhere'"),
        ("--suite suite.yaml --methods tensor.yaml --seeds one", "--seeds: invalid int value: 'one'"),
        ("--suite suite.yaml --methods tensor.yaml --seeds 1 1", "seeds must be different numbers from 0 on, not 1 1"),
        (
            "--suite suite.yaml --methods tensor.yaml --seed 1",
            r"no argument --seed: did you mean '--seeds'\? What",
        ),
        (
            "--suite suite.yaml --methods tensor.yaml --steps 1",
            r"no argument --steps\. What is meant for every run",
        ),
    ],
)
def test_bad_input_ends_in_one_sentence_before_any_work(arguments, message, capsys):
    Path("torn.yaml").write_text("model: {init_args")
    Path("away.yaml").write_text("model: {init_args: {suite: {class_path: nowhere.Suite}}}\n")
    with pytest.raises(SystemExit) as stopped:
        compare.main(arguments.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not Path("runs").exists()


# -- what is run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run() -> Run:
    return Plan([*GIVEN, "tensor.yaml", "--seeds", "0"]).runs[0]


def test_a_run_is_done_if_the_same_configuration_ended_well(run):
    assert run.results() is None
    leave(run, **results())
    assert run.results() == results()
    assert run.record().peak_gb == 1.5
    Path("tensor.yaml").write_text("# Only a comment has changed\n")
    assert run.results() is None, "an overlay with other contents is another configuration"


def test_a_run_that_ended_unseen_is_done_and_one_that_failed_is_not(run):
    leave(run, STOPPED, **results())
    assert run.results() is not None
    (run.folder / "run.json").write_text(json.dumps(asdict(replace(run.record(), error="no space left"))))
    assert run.results() is None


@pytest.mark.parametrize(("found", "said"), [(results(0.7), "70.0 %, 2 s"), ({"rows": []}, "not scored, 2 s")])
def test_the_end_of_a_run_in_a_line(run, found, said):
    leave(run, **found)
    assert compare._ending(run, run.record()).startswith(said)


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(run):
    leave(run, STOPPED)
    assert "--ckpt_path" not in run.command()
    (run.folder / "checkpoints").mkdir()
    last = run.folder / "checkpoints/last.ckpt"
    last.touch()
    assert run.start().seconds == 2.0
    assert run.command()[-2:] == ["--ckpt_path", str(last)]


@pytest.mark.parametrize("record", [True, False])
def test_a_run_of_another_configuration_is_moved_aside(run, record):
    leave(run, **results())
    if not record:
        (run.folder / "run.json").write_text("{")
    other = replace(run, arguments=(*run.arguments, "--trainer.max_steps", "9"))
    assert other.start() == Record(other.key())
    assert [path.name for path in run.folder.iterdir()] == ["run.json"]
    assert len(list(run.folder.parent.glob("seed0.*/results.json"))) == 1


def test_a_child_is_measured_and_its_end_is_told(tmp_path):
    log = tmp_path / "log.txt"
    code, peak = wait([sys.executable, "-c", "x = bytearray(10**6); print('said')"], log)
    assert (code, log.read_text()) == (0, "said\n")
    assert 0.005 < peak < 500
    code, _ = wait([sys.executable, "-c", "raise RuntimeError('no more')"], log)
    assert reason(code, log) == "RuntimeError: no more"
    code, _ = wait([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log)
    assert reason(code, log) == "killed by SIGKILL (out of memory?)"


def test_reasons_are_the_sentence_of_an_error_or_the_last_line(tmp_path):
    log = tmp_path / "log.txt"
    log.touch()
    assert reason(3, log) == "ended with exit code 3"
    log.write_text("one\nerror: what is wrong\nlast words\n\n")
    assert reason(2, log) == "what is wrong"
    assert "without results" in reason(0, log)


def test_stopping_leaves_a_record_and_no_child(run, monkeypatch):
    """An interruption while a child runs: it is ended, and the next call knows that it was not done."""
    started = []
    monkeypatch.setattr(Run, "command", lambda self: [sys.executable, "-c", "import time; time.sleep(60)"])

    def interrupted(pid: int, options: int):
        started.append(pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "wait4", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(run)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
    assert run.record().error == STOPPED
    assert run.results() is None


def test_nothing_is_repeated(capsys, monkeypatch):
    arguments = [*GIVEN, "tensor.yaml", "task_wise.yaml", "--seeds", "0", "1"]
    for number, run in enumerate(Plan(arguments).runs):
        leave(run, **results(0.6 + number / 100))
    monkeypatch.setattr(plans, "execute", lambda run: pytest.fail("a run was repeated"))
    with pytest.raises(SystemExit) as stopped:
        compare.main(arguments)
    assert stopped.value.code == 0
    assert "4 of 4 runs are there already" in capsys.readouterr().out
    text = Path("out/compare.md").read_text()
    assert "| One per tensor | 61.0 ± 1.4 | 67.8 ± 1.6 | 12 | 1.50 |" in text
    assert "| task_wise | **62.0 ± 1.4** | **68.9 ± 1.6** | 12 | 1.50 |" in text
    assert "| task_wise | **52.0 ± 1.4** | **72.0 ± 1.4** |" in text
    assert "python -m trainers.compare --suite suite.yaml" in text
    assert {path.name for path in Path("out/figures").iterdir()} == {
        "accuracy_vs_parameters.png",
        "accuracy_by_task.png",
    }


def test_an_interruption_keeps_and_shows_what_is_there(capsys, monkeypatch):
    arguments = [*GIVEN, "tensor.yaml", "task_wise.yaml", "--seeds", "0"]
    leave(Plan(arguments).runs[0], **results())

    def stop(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(plans, "execute", stop)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        compare.main(arguments)
    assert stopped.value.code == 130
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "task_wise, seed 0: not run yet" in capsys.readouterr().out
    assert "| One per tensor | 60.0 |" in Path("out/compare.md").read_text()


def test_one_failing_method_does_not_lose_the_other(capsys):
    """Real children: the suite is prepared, one method cannot be built, the other one is adapted and scored."""
    with pytest.raises(SystemExit) as stopped:
        compare.main([*GIVEN, "broken.yaml", "tensor.yaml", "--seeds", "4", "--", "--report.figures", "false"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert re.search(r"1/2 broken, seed 4: failed: .*, got nothing", out)
    assert re.search(r"2/2 One per tensor, seed 4: \d+\.\d %, \d+ s, \d\.\d GB", out)
    found = json.loads(Path("out/compare.json").read_text())
    assert [row["label"] for row in found["rows"]][-3:] == [BEST, "broken", "One per tensor"]
    assert found["rows"][-2]["accuracy"] == {}
    assert set(found["rows"][-1]["accuracy"]) == {"one", "two", "three"}
    ended = found["runs"][1]
    assert (ended["results"]["seed"], ended["results"]["steps"]) == (4, 3)
    assert ended["results"]["suite_arguments"]["seed"] == 4
    assert 0.05 < ended["peak_gb"] < 50
    assert "Learns" in Path("out/runs/tensor/seed4/log.txt").read_text()
    text = Path("out/compare.md").read_text()
    assert "| broken (0 of 1 seeds) | – |" in text
    assert "| teacher |" not in text
    assert re.search(r"- broken, seed 4: .*, got nothing \(out/runs/broken/seed4/log\.txt\)", text)


@pytest.mark.slow
def test_a_stopped_comparison_goes_on_where_it_was():
    """Two seeds; Ctrl-C in the first run; the same command again ends with everything."""
    every = ["--checkpoint.every_n_train_steps=5", "--report.figures=false", "--trainer.max_steps=400"]
    command = [sys.executable, "-m", "trainers.compare", *GIVEN, "tensor.yaml", "--seeds", "0", "1"]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}"}
    process = subprocess.Popen([*command, "--", *every], env=environment, stdout=subprocess.DEVNULL)
    last = Path("out/runs/tensor/seed0/checkpoints/last.ckpt")
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not Path("out/runs/tensor/seed0/results.json").exists()
    assert subprocess.run([*command, "--", *every], env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert len(list(Path("out/runs/tensor/seed0/logs/csv").iterdir())) == 2, "resumed, not begun anew"
    found = json.loads(Path("out/compare.json").read_text())
    assert [row["seeds"] for row in found["rows"]] == [[0, 1]] * len(found["rows"])
    assert {run["results"]["steps"] for run in found["runs"]} == {400}


# -- what is gathered --------------------------------------------------------------------------------------------------


@pytest.fixture
def comparison() -> Comparison:
    """Two seeds of a method with a second row, one seed of another, none of a third."""
    found = {"one": 0.9, "two": 1.0}
    cost = {"given": 0.75, "stored_parameters": 2e7, "task_identification": found}
    cost["information"] = ["images", "task id", "teacher", "train data"]
    return Comparison.of(
        [
            Outcome("C", 0, error="killed by SIGKILL"),
            Outcome("C", 1, error="killed by SIGKILL"),
            Outcome("A", 0, results(0.8, "0.3", seconds_per_step=0.1, **cost), peak_gb=1.0),
            Outcome("A", 1, results(0.9, "0.4", seconds_per_step=0.3, **cost), peak_gb=2.0),
            Outcome("B", 0, results(0.6)),
            Outcome("B", 1, error="RuntimeError: no", log="B/log.txt"),
        ],
        "tiny",
        "the command",
        seeded=True,
    )


def test_rows_are_means_over_seeds(comparison):
    assert [row.label for row in comparison.rows] == ["base", "experts", BEST, "C", "A", "A, task given", "B"]
    row = row_of(comparison, "A")
    average = row.numbers["average"]
    assert (average.mean, average.std) == (pytest.approx(0.85), pytest.approx(0.1 / 2**0.5))
    assert row.accuracy["two"].mean == pytest.approx(0.95)
    assert row.numbers["learned_parameters"].mean == 12
    assert row.numbers["task_identification"].mean == pytest.approx(0.95)
    assert row.told == "teacher, train data"
    assert row_of(comparison, "A, task given").numbers["average"].mean == 0.75
    assert "task_identification" not in row_of(comparison, "A, task given").numbers
    assert row_of(comparison, "B").numbers["average"].std is None
    assert "seconds_per_step" not in row_of(comparison, "B").numbers
    assert row_of(comparison, "C").accuracy == {}


def test_references_are_those_of_each_seed_s_first_run():
    first, second = results(), results()
    second["rows"][0]["average"] = 0.1
    found = Comparison.of([Outcome("A", 0, first), Outcome("B", 0, second)], "tiny")
    assert row_of(found, "base").numbers["average"].mean == 0.4


def test_everything_is_in_the_json(comparison):
    data = json.loads(json.dumps(asdict(comparison)))
    assert data["rows"][4]["numbers"]["average"]["mean"] == pytest.approx(0.85)
    assert [row["method"] for row in data["rows"]] == [None] * 3 + ["C", "A", "A", "B"]
    assert data["runs"][5]["error"] == "RuntimeError: no"
    assert data["runs"][2]["results"]["learned_parameters"] == 12


def test_the_report_says_what_a_reader_needs(comparison):
    text = comparison.markdown()
    heads = [line for line in text.splitlines() if line.startswith("| method")]
    summary = "| method | avg | norm | task found | learned | stored | s/step | peak GB | told |"
    assert heads == [summary, "| method | one | two |"]
    row = "| A | **85.0 ± 7.1** | **94.4 ± 7.9** | 95.0 | 12 | 20.0 M | 0.200 | 1.50 | teacher, train data |"
    assert row in text.splitlines()
    assert "| A | **75.0 ± 7.1** | **95.0 ± 7.1** |" in text
    assert "| B (1 of 2 seeds) | 60.0 | 66.7 | – | 12 | – | – | – | – |" in text
    assert "| C (0 of 2 seeds) |" + " – |" * 8 in text
    assert "Seeds of models, stream and adaptation: 0, 1; torch 2." in text
    assert "oracle: scale 0.3, 0.4, chosen with labels" in text
    assert "- B, seed 1: RuntimeError: no (B/log.txt)" in text
    assert "```bash\nthe command\n```" in text


def test_many_tasks_get_tables_of_their_own():
    tasks = tuple(f"task{i}" for i in range(23))
    text = Comparison.of([Outcome("A", 0, results(tasks=tasks))], "tiny").markdown()
    tables = [line for line in text.splitlines() if line.startswith("| method")]
    assert [line.count("|") - 2 for line in tables] == [3, 10, 10, 3]


@pytest.mark.parametrize("width", ["60", "90", "160"])
def test_no_cell_is_cut_off_on_a_terminal(comparison, width, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", width)
    comparison.show()
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in text
    assert all(words in text for words in ("85.0 ± 7.1", "75.0 ± 7.1", "train data", "B, seed 1: RuntimeError: no"))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("learned_parameters", 131_072, "131,072"),
        ("stored_parameters", 87_456_000, "87.5 M"),
        ("seconds_per_step", 0.00123, "0.00123"),
        ("seconds_per_step", 0.5, "0.500"),
        ("seconds_per_step", 123.4, "123"),
    ],
)
def test_numbers_read_well(name, value, text):
    assert f"| {text} |" in Comparison.of([Outcome("A", 0, results(**{name: value}))], "tiny").markdown()


def test_figures_are_drawn_whatever_is_there(comparison, tmp_path):
    alone = results(learned_parameters=0)
    alone["rows"] = alone["rows"][-2:]  # without references
    partly = results(learned_parameters=1)
    del next(row for row in partly["rows"] if row["method"] == "experts")["accuracy"]["two"]  # which has no expert
    for name, found in (
        ("some", comparison),
        ("one", Comparison.of([Outcome("A", 0, alone)], "tiny")),
        ("partly", Comparison.of([Outcome("A", 0, partly)], "tiny")),
        ("none", Comparison.of([Outcome("A", 0, error="no")], "tiny")),
    ):
        compare_figures.draw(found, tmp_path / name)
    drawn = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert drawn == [
        f"{a}/{b}.png" for a in ("one", "partly", "some") for b in ("accuracy_by_task", "accuracy_vs_parameters")
    ]


def test_the_legend_names_methods_best_first(comparison, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(compare_figures, "save", lambda figure, path: saved.append(figure))
    compare_figures.accuracy_vs_parameters(comparison, tmp_path / "figure.png")
    axes = saved[0].axes[0]
    names = ["90.0  experts", "85.0 ± 7.1  A", "75.0  A, task given", "60.0  B", f"50.0  {BEST}"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == names
    left, right = axes.get_xlim()
    assert left < 0 < 12 < right
