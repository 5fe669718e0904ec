"""What benchmarks compute themselves."""

import sys
import time

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
