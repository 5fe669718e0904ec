"""The command line as a user meets it: `python train.py ...` in a folder of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from adamerge import read_coefficients
from trainers import Adaptation
from trainers.cli import main

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TINY = ["--model.init_args.suite=tiny_suite.TinySuite", "--data.init_args.batch_size=4", "--trainer.accelerator=cpu"]


def arguments(command: str, *extra: str) -> list[str]:
    return [command, *TINY, *extra]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run() -> Path:
    main(arguments("fit", "--trainer.max_steps=12", "--trainer.val_check_interval=6", "--name=tiny"))
    return Path("runs/tiny")


def test_fit_leaves_a_complete_run(run, capsys):
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "checkpoints", "logs", "results.json", "results.md", "coefficients.json", "figures",
    }  # fmt: skip
    results = json.loads((run / "results.json").read_text())
    assert results["suite"] == "tiny"
    rows = {row["method"]: row for row in results["rows"]}
    assert [name.split(" (")[0][:15] for name in rows] == [
        "base", "experts", "mean", "task arithmetic", "task arithmetic", "this run, start", "this run, adapt",
    ]  # fmt: skip
    for row in rows.values():
        assert row["average"] == pytest.approx(sum(row["accuracy"].values()) / 3)
    assert rows["experts"]["normalised"] == pytest.approx(1.0)
    assert rows["this run, start"]["accuracy"] == rows["task arithmetic 0.3"]["accuracy"]
    assert (results["steps"], results["seed"]) == (12, 0)
    assert results["wall_seconds"] > 0
    assert set(results["fingerprints"]) == {"base", "one", "two", "three"}
    assert len((run / "results.md").read_text().splitlines()) > 10
    figures = {path.name for path in (run / "figures").iterdir()}
    assert figures == {"coefficients.png", "coefficients_over_steps.png", "progress.png", "accuracy.png"}
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["suite"]["class_path"]
    assert next(run.glob("logs/csv/*/metrics.csv"))
    assert next(run.glob("logs/tensorboard/*/events*"))


def test_test_and_python_give_the_numbers_of_the_run(run, capsys):
    results = json.loads((run / "results.json").read_text())
    adapted = results["rows"][-1]["accuracy"]
    capsys.readouterr()
    main(arguments("test", f"--ckpt_path={run}/checkpoints/last.ckpt"))
    printed = capsys.readouterr().out
    for value in adapted.values():
        assert f"{100 * value:.1f}" in printed
    assert f"accuracy in %, {run}/checkpoints/last.ckpt" in printed
    module = Adaptation.load_from_checkpoint(run / "checkpoints/last.ckpt")
    table = read_coefficients(run / "coefficients.json")
    assert table.rows == module.coefficients.table().rows
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(module.merged.materialise()(images), module.merged(images))


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize("extra", [[], ["--ckpt_path=last"]], ids=["none", "last, of which there is none"])
def test_scores_of_the_start_say_that_nothing_was_learned(command, extra, capsys):
    main(arguments(command, *extra))
    assert "accuracy in %, as it begins: no checkpoint was given (--ckpt_path)" in capsys.readouterr().out


def test_the_suite_of_a_checkpoint_can_be_another_one_with_the_same_models(run):
    from tiny_suite import TinySuite

    module = Adaptation.load_from_checkpoint(run / "checkpoints/last.ckpt", suite=TinySuite(images=5))
    assert len(module.suite.dataset("one", "test")) == 5


def test_export_writes_the_adapted_weights(run):
    from safetensors.torch import load_file

    main(
        [
            "export",
            f"--config={run}/config.yaml",
            f"--ckpt_path={run}/checkpoints/last.ckpt",
            "--output=merged.safetensors",
        ]
    )
    module = Adaptation.load_from_checkpoint(run / "checkpoints/last.ckpt")
    for name, value in module.merged.merged_state_dict().items():
        assert torch.equal(load_file("merged.safetensors")[name], value)


def test_overlays_change_what_they_name():
    Path("grain.yaml").write_text("model: {init_args: {coefficients: {init_args: {grain: block}}}}\n")
    Path("bound.yaml").write_text(
        "model: {init_args: {coefficients: {init_args: {bound: tanh}}}}\ntrainer: {max_steps: 2}\n"
    )
    main(
        arguments(
            "fit", "--config=grain.yaml", "--config=bound.yaml", "--report.references=false", "--report.figures=false"
        )
    )
    results = json.loads(Path("runs/run/results.json").read_text())
    method = results["method"]
    assert (method["coefficients"]["grain"], method["coefficients"]["bound"]) == ("block", "tanh")
    assert [phase["objective"]["name"] for phase in method["phases"]] == ["Entropy"]
    assert (method["optimizer"]["name"], method["optimizer"]["lr"]) == ("Adam", 1e-3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.init_args.coefficients.init_args.grian=tensor", "'grian' is not accepted"),
        (
            "--model.init_args.coefficients.init_args.grain=layer",
            r"model\.coefficients\.grain .*'column', got layer",
        ),
        ("--data.init_args.batch_size=three", r"data\.batch_size .*Expected int, got three"),
        ("--data.init_args.batch_size=0", "batch sizes must be positive"),
        ("--trainer.max_step=3", r"no argument --trainer\.max_step: did you mean '--trainer\.max_steps'\?"),
        ("--micro_batches true", r"did you mean '--model\.init_args\.micro_batches'\?"),
        ("--steps 3", r"did you mean '--trainer\.max_steps'\?"),
        ("--wibblywob 3", "no argument --wibblywob: --help lists all"),
        ("--config=nothing.yaml", r"there is no file nothing\.yaml$"),
        ("--ckpt_path=nothing.ckpt", r"nothing\.ckpt"),
        ("--model.init_args.suite=nowhere.Suite", "No module named 'nowhere'"),
        ("--model.init_args.suite=torch.nn.ReLU", "torch.nn.ReLU"),
        (
            "--model.init_args.coefficients.init_args.bound=clamp --model.init_args.coefficients.init_args.init=2.0",
            "init 2 is",
        ),
        ("--model.init_args.coefficients.init_args.init=nowhere.json", r"no such file of coefficients: nowhere\.json"),
        ("--trainer.max_steps=-1", "a stream has no end"),
        ("--trainer.precision=bf16-true", "use bf16-mixed"),
        ("--ckpt_path=truncated.ckpt", r"truncated\.ckpt cannot be read"),
        ("--ckpt_path=pickle.ckpt", "holds pickled Python objects"),
    ],
)
def test_bad_input_ends_in_one_sentence_before_any_work(argument, message, capsys, monkeypatch):
    def prepare(self, fine_tune):
        pytest.fail("work started")

    monkeypatch.setattr("tiny_suite.TinySuite.prepare", prepare)
    torch.save({"state_dict": {}}, "whole.ckpt")
    Path("truncated.ckpt").write_bytes(Path("whole.ckpt").read_bytes()[:300])
    torch.save({"model": torch.nn.Linear(1, 1)}, "pickle.ckpt")
    with pytest.raises(SystemExit) as stopped:
        main(arguments("fit", "--trainer.max_steps=1", *argument.split()))
    assert stopped.value.code == 2
    error = "error: " + capsys.readouterr().err.strip().split("error: ", 1)[1]
    assert re.search(message, error), error
    assert not list(Path().glob("runs/*/results.json"))


@pytest.mark.parametrize(
    ("command", "missing"),
    [("export", "--ckpt_path, --output"), ("export --output=o", "--ckpt_path"), ("predict", "--source")],
)
def test_an_argument_that_is_missing_is_named_as_it_is_typed(command, missing, capsys):
    with pytest.raises(SystemExit):
        main(command.split())
    assert capsys.readouterr().err == f"error: the following arguments are required: {missing}\n"


def helped(capsys, *command: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_reads_well(capsys):
    text = helped(capsys)
    for word in ("fit", "export", "configs/base.yaml"):
        assert word in text
    listed = text.partition("Available subcommands:")[2].split("\n    ")
    assert [line[:9] for line in listed[2:]] == ["fit      ", "validate ", "test     ", "predict  ", "export   "]
    assert all(line.strip().endswith(".") for line in listed[2:]), "whole sentences of one line"


@pytest.mark.parametrize("command", ["fit", "export"])
def test_help_begins_with_what_a_run_is_made_of(command, capsys):
    text = helped(capsys, command)
    assert "<class" not in text
    assert text.index("options:") < text.index("--seed_everything") < 1500, "after a short usage"
    titles = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    names = [title.split()[0] for title in titles if title.partition(" ")[0] not in ("default", "options:", "Linked")]
    assert names == ["What", "The", "Of", "What", "When", "Lightning's"]


def learned(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)["state_dict"]["coefficients.raw"]


def test_a_killed_run_resumes_bit_for_bit(environment):
    """kill -9 in mid-run: the last checkpoint is whole, and the resumed run ends where an undisturbed one ends."""
    command = [sys.executable, ROOT / "train.py", *arguments("fit", "--trainer.max_steps=4000", "--name=killed")]
    command += ["--checkpoint.every_n_train_steps=5", "--report.figures=false", "--report.references=false"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = Path("runs/killed/checkpoints/last.ckpt")
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = torch.load(last, weights_only=True)["global_step"]
    assert 0 < reached < 4000
    end = reached + 12
    rest = ["--report.figures=false", "--report.references=false", f"--trainer.max_steps={end}"]
    main(arguments("fit", "--name=killed", f"--ckpt_path={last}", *rest))
    main(arguments("fit", "--name=whole", *rest))
    resumed, whole = (torch.load(f"runs/{n}/checkpoints/last.ckpt", weights_only=True) for n in ("killed", "whole"))
    assert resumed["global_step"] == whole["global_step"] == end
    assert torch.equal(resumed["state_dict"]["coefficients.raw"], whole["state_dict"]["coefficients.raw"])
    assert len(list(Path("runs/killed/logs/csv").iterdir())) == 2, "the log of the killed run is kept"


def test_a_resumed_run_reports_all_of_it():
    """Stopped right after a validation, at the step of a checkpoint: no validation is lost, none comes twice."""
    every = ["--trainer.val_check_interval=5", "--checkpoint.every_n_train_steps=5", "--report.references=false"]
    main(arguments("fit", "--name=whole", "--trainer.max_steps=15", *every))
    main(arguments("fit", "--name=parts", "--trainer.max_steps=10", *every))
    last = "--ckpt_path=runs/parts/checkpoints/last.ckpt"
    main(arguments("fit", "--name=parts", "--trainer.max_steps=15", last, *every))
    reports = []
    for name in ("whole", "parts"):
        saved = torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)
        reports.append(next(state for key, state in saved["callbacks"].items() if key.startswith("Report")))
    assert list(reports[1]["accuracies"]) == [0, 5, 10, 15]
    assert reports[0]["accuracies"] == reports[1]["accuracies"]
    assert reports[0]["steps"] == reports[1]["steps"] == list(range(1, 16))
    assert torch.equal(reports[0]["losses"], reports[1]["losses"])


def test_two_processes_learn_what_one_learns(environment):
    settings = [
        "--trainer.max_steps=8",
        "--report.figures=false",
        "--report.references=false",
        "--trainer.val_check_interval=8",
    ]
    main(arguments("fit", "--name=one", *settings))
    command = [sys.executable, ROOT / "train.py", *arguments("fit", "--name=two", *settings)]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp", "--model.init_args.micro_batches=true"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=240)
    one, two = (learned(Path(f"runs/{name}/checkpoints/last.ckpt")) for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    scores = [
        json.loads(Path(f"runs/{name}/results.json").read_text())["rows"][-1]["accuracy"] for name in ("one", "two")
    ]
    assert scores[0] == scores[1]
