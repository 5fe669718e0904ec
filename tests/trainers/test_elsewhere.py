"""Overlays run where a GPU would: on a device that refuses tensors of the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

HERE = Path(__file__).resolve().parent
METHODS = HERE.parents[1] / "configs" / "methods"
#: Which need a file of another library to be written from there (fda), or change a tensor's shape in place (mgda).
NOT_HERE = {"fda", "mgda"}
SOME = ["wemoe", "surgery", "tint", "concrete", "static_ties"]

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a newer torch"
)


def run(names: list[str], folder: Path) -> list[str]:
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "ADAMERGE_CACHE": str(folder)}
    command = [sys.executable, str(HERE / "elsewhere.py"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_methods_run_there(tmp_path):
    assert run(SOME, tmp_path) == SOME


@pytest.mark.slow
def test_all_methods_run_there(tmp_path):
    names = sorted(path.stem for path in METHODS.glob("*.yaml") if path.stem not in NOT_HERE)
    assert run(names, tmp_path) == names
