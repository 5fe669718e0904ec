"""What benchmarks compute themselves."""

import argparse
import importlib.util
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmarks.gpu
from adamerge import TaskVectors
from modules import Coefficients, MergedModel


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_run_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(benchmarks.gpu.subprocess, "run", None)
    benchmarks.gpu.main()
    assert capsys.readouterr().out.startswith("no CUDA device on this machine")


@pytest.mark.parametrize("command", benchmarks.gpu.COMMANDS[1:])
def test_what_a_gpu_runs_is_there_with_its_options(command):
    module, *words = command.split()
    source = Path(importlib.util.find_spec(module).origin).read_text()
    options = re.findall(r'"(--[a-z-]+)"', source)
    for word in words if module != "train" else ():
        assert word in options if word.startswith("--") else re.search(rf'"{word}"|int', source), word


@pytest.mark.slow
def test_activations_are_what_the_backward_pass_needs_but_weights_and_images():
    from benchmarks.scaling import activations

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    base = {name: value.detach() for name, value in model.state_dict().items()}
    deltas = {name: torch.ones(2, *value.shape) for name, value in base.items()}
    merged = MergedModel(model, TaskVectors(base, deltas, ("a", "b"), fingerprints={}), Coefficients())
    assert activations(merged, torch.randn(5, 6)) == 4 * 5 * 8


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system says there how much memory is whose")
def test_memory_of_files_is_told_from_a_process_own(tmp_path):
    from benchmarks.scaling import sampled

    file, size = tmp_path / "file", 10**8
    file.write_bytes(bytes(size))
    with sampled(before := {}):
        time.sleep(0.2)
    with sampled(peak := {}):
        mapped = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
        assert int(mapped.max()) == 0
        time.sleep(0.2)
    assert peak["mapped"] - before["mapped"] == pytest.approx(0.1, abs=0.02)
    assert peak["own"] - before["own"] < 0.02


@pytest.mark.slow
def test_a_device_that_has_its_batch_waits_for_nothing():
    """Of a tiny model on a CPU nothing else is sure: the steps are taken, on the same batch or on the stream's."""
    from benchmarks.idle import KEPT, MOVED, SAME, Random, Repeated, measured
    from trainers import Adaptation

    args = argparse.Namespace(
        size="tiny", experts=2, images=2, device="cpu", steps=2, repeats=1, micro_batches=False
    )  # fmt: skip
    found = measured(args)
    assert set(found) == {SAME, KEPT, MOVED, f"idle, {KEPT}", f"idle, {MOVED}"}
    assert all(map(math.isfinite, found.values()))
    assert found[f"idle, {KEPT}"] == 1 - found[SAME] / found[KEPT]
    suite, stream = Random("tiny", 2, 8), Repeated(2, images_on_device=True)
    stream.trainer = argparse.Namespace(
        lightning_module=Adaptation(suite), global_rank=0, world_size=1, accumulate_grad_batches=1
    )
    stream.trainer.lightning_module.without_images = list
    steps = stream.steps()
    assert steps[0] is steps[7]
    assert steps.at_hand


@pytest.mark.slow
def test_a_figure_says_what_stays_the_same_and_where_it_was_measured(tmp_path, monkeypatch):
    from benchmarks import scaling_figures

    point = {"size": "8M", "experts": 2, "images": 16, "processes": 1, "parameters": 8.3e6, "gigabytes": 1.0}
    points = [{**point, "experts": k, "adaptation step": 0.1 * k, "training step": 0.1} for k in (2, 4, 8)]
    fixed = "P = 8.3 M parameters, 16 images a step, 1 process"
    assert scaling_figures.title("experts", points) == fixed
    points[0] |= {"machine": "2 CPU cores", "date": "1 May 2026"}
    assert scaling_figures.title("experts", points) == f"{fixed}\n2 CPU cores, 1 May 2026"
    assert scaling_figures.title("images", points).startswith("K = 2 experts, P = 8.3 M")
    monkeypatch.setattr(scaling_figures, "FIGURES", tmp_path)
    scaling_figures.draw("experts", points)
    assert (tmp_path / "experts.png").stat().st_size > 10_000


@pytest.mark.slow
def test_storage_has_every_form():
    from benchmarks.adaptation_step import Bench
    from benchmarks.scaling import stored

    bench = Bench("tiny", 2, 1, "cpu")
    sizes = {name: sum(d.nbytes for d in vectors.deltas.values()) for name, vectors in stored(bench, "cpu")}
    whole = sizes["float32 in memory"]
    assert sizes["sparse, a tenth of all numbers"] < 0.25 * whole
    assert sizes["bfloat16 on disk"] == whole / 2
    assert list(sizes)[-1] == "rank 16"
