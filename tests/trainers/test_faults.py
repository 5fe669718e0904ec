"""Runs that are killed, told to stop or short of disk: they go on where they were, and end where others end."""

import json
import logging
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from adamerge.checkpoints import load_torch
from adamerge.coefficients import read_coefficients
from trainers import compare, compare_runs
from trainers.cli import main
from trainers.compare_runs import die_with

HERE = Path(__file__).parent
STEPS = 24
#: Everything that keeps something from step to step: moments of Adam, a guard's snapshots, validations, the report.
RUN = {
    "model": {"init_args": {"suite": {"class_path": "tiny_suite.TinySuite"}}},
    "data": {"init_args": {"batch_size": 4}},
    "report": {"figures": False, "references": False},
    "trainer": {
        "accelerator": "cpu", "max_steps": STEPS, "val_check_interval": 10, "enable_progress_bar": False,
        "callbacks": {"class_path": "trainers.Guard", "init_args": {"every": 5, "keep": "information"}},
    },
}  # fmt: skip

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and counts a process's time"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(str(HERE))
    Path("run.yaml").write_text(yaml.safe_dump(RUN))


def child(function: Callable[..., object], *args: object) -> multiprocessing.Process:
    """A process that has everything imported already."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def fit(name: str, *more: str, seconds: float = 0.0) -> None:
    """A run that the system ends, as `kill -9` does, when it has computed for so long (0: it does not)."""
    logging.getLogger("trainers").addHandler(logging.FileHandler(f"{name}.log"))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    main(["fit", "--config=run.yaml", f"--name={name}", "--ckpt_path=last", *more])
    Path(f"{name}.seconds").write_text(str(time.process_time()))


def ended(name: str, **kwargs) -> int:
    process = child(fit, name) if not kwargs else child(lambda: fit(name, **kwargs))
    process.join()
    return process.exitcode


def state(name: str) -> dict:
    """What a run that ended has learned, and all that it keeps; without times, and its own paths."""
    saved = load_torch(Path(f"runs/{name}/checkpoints/last.ckpt"))
    kept = {key.split("{")[0]: value for key, value in saved["callbacks"].items()}
    kept.pop("Checkpoint")
    kept["Report"] = {key: value for key, value in kept["Report"].items() if key not in ("seconds", "durations")}
    return {key: saved[key] for key in ("state_dict", "optimizer_states", "global_step", "adamerge")} | kept


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def check_whole(folder: Path) -> None:
    """Every file that has its own name can be read to its end."""
    for path in folder.rglob("[!.]*"):
        if path.suffix == ".ckpt":
            load_torch(path)
        elif path.name == "coefficients.json":
            read_coefficients(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "config.yaml":
            assert "trainer" in yaml.safe_load(path.read_text())


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def killed_at_random(points: int, seed: int) -> list[bool]:
    """Whether each of so many runs, killed at a random moment and resumed, ended where the undisturbed one did."""
    assert ended("whole") == 0
    whole, seconds = state("whole"), float(Path("whole.seconds").read_text())
    drawn, found = random.Random(seed), []
    for point in range(points):
        name = f"killed{point}"
        code = ended(name, seconds=drawn.uniform(0, 1) * seconds)
        assert code in (-signal.SIGPROF, 0)
        check_whole(Path("runs", name))
        assert ended(name) == 0
        words = [Path("runs", run, "coefficients.json").read_text() for run in ("whole", name)]
        found.append(same(state(name), whole) and words[0] == words[1])
    return found


def test_a_run_killed_at_any_moment_ends_where_an_undisturbed_one_does():
    assert killed_at_random(3, seed=0) == [True] * 3


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_killed_at_any_of_20_moments_ends_where_an_undisturbed_one_does():
    assert killed_at_random(20, seed=1) == [True] * 20


# -- told to stop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_run_that_is_told_to_stop_leaves_its_last_step_and_says_how_to_go_on(name, capfd, monkeypatch):
    number = getattr(signal, name)
    tools = Path("tools")
    tools.mkdir()
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" > asked.txt\n')
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools.absolute()}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    process = child(fit, "stopped", "--trainer.max_steps=100000")
    last = Path("runs/stopped/checkpoints/last.ckpt")
    while not last.exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    step = load_torch(last)["global_step"]
    said = Path("stopped.log").read_text()
    assert f"Stopped by {name} at step {step} of 100000, which is in " in said
    assert "--ckpt_path last goes on" in said
    asked = Path("asked.txt")
    assert (asked.read_text() if asked.exists() else "") == ("requeue 17\n" if name == "SIGUSR1" else "")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    process = child(main, ["fit", "--config=run.yaml", "--name=stopped", f"--trainer.max_steps={step + 3}"])
    process.join()
    assert process.exitcode == 0
    assert state("stopped")["Report"]["steps"] == list(range(1, step + 4)), "a job that was put back resumes by itself"


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_what_was_there_is_whole(capfd):
    assert ended("full") == 0
    before = load_torch(Path("runs/full/checkpoints/last.ckpt"))["global_step"]

    def short_of_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        fit("full", f"--trainer.max_steps={STEPS + 10}", "--trainer.logger=false")

    process = child(short_of_disk)
    process.join()
    assert process.exitcode == 2
    assert re.search("no space left for .*runs/full", said := capfd.readouterr().err)
    assert "MB are free" in said
    check_whole(Path("runs/full"))
    assert load_torch(Path("runs/full/checkpoints/last.ckpt"))["global_step"] == before
    assert not list(Path("runs/full").rglob("*.tmp"))


# -- a comparison that is killed ---------------------------------------------------------------------------------------


def compared(output: str, seconds: float = 0.0) -> None:
    """A comparison of two methods whose runs are children of its own process; all of it is killed after so long."""

    def wait(command: list[str], log: Path) -> tuple[int, float]:
        parent = os.getpid()

        def run() -> None:
            die_with(parent)
            main(command[2:])

        made = child(run)
        made.join()
        return made.exitcode, 0.1

    compare_runs.wait = wait
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's own limit of time has a handler for it
    signal.setitimer(signal.ITIMER_REAL, seconds)
    methods = ["--methods", "tensor.yaml", "task_wise.yaml", "--seeds=0"]
    more = ["--report.figures=false", "--report.references=false"]
    compare.main(["--suite=suite.yaml", "--config=common.yaml", *methods, f"--output={output}", "--", *more])


def compared_at_random(points: int, seed: int) -> list[bool]:
    """Whether each of so many comparisons, killed at a random moment and begun again, found what a whole one did."""
    texts = {
        "suite": "model: {init_args: {suite: {class_path: tiny_suite.TinySuite}}}\n",
        "common": "data: {init_args: {batch_size: 4}}\ntrainer: {accelerator: cpu, max_steps: 12}\n",
        "tensor": "model: {init_args: {coefficients: {init_args: {grain: tensor}}}}\n",
        "task_wise": "model: {init_args: {coefficients: {init_args: {grain: model}}}}\n",
    }
    for name, text in texts.items():
        Path(f"{name}.yaml").write_text(text)

    def ended(output: str, seconds: float = 0.0) -> int:
        process = child(compared, output, seconds)
        process.join()
        return process.exitcode

    def found(output: str) -> list[str]:
        return [Path(output, f"runs/{name}/seed0/coefficients.json").read_text() for name in ("tensor", "task_wise")]

    began = time.monotonic()
    assert ended("whole") == 0
    drawn, whole, same_end = random.Random(seed), time.monotonic() - began, []
    for point in range(points):
        assert ended(f"killed{point}", drawn.uniform(0.05, 1) * whole) in (-signal.SIGALRM, 0)
        check_whole(Path(f"killed{point}"))
        assert ended(f"killed{point}") == 0
        same_end.append(found(f"killed{point}") == found("whole"))
    return same_end


def test_a_comparison_killed_at_any_moment_finds_what_an_undisturbed_one_does():
    assert compared_at_random(1, seed=0) == [True]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_comparison_killed_at_any_of_20_moments_finds_what_an_undisturbed_one_does():
    assert compared_at_random(20, seed=1) == [True] * 20
