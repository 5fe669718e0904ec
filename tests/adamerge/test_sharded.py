"""Deltas that two processes share out, against those that one has."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adamerge import InputError, TaskVectors
from adamerge.rules import Store

SCRIPT = Path(__file__).with_name("ranks.py")


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_exchange_the_gradient_of_coefficients_alone(tmp_path):
    commands = [[sys.executable, SCRIPT, str(rank), str(tmp_path / "meet")] for rank in range(2)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "".join(errors)[-3000:]


def test_one_process_has_nobody_to_share_with():
    vectors = TaskVectors({"w": torch.zeros(3)}, {"w": torch.ones(2, 3)}, ("a", "b"), fingerprints={})
    with pytest.raises(InputError, match=r"Store\(place='processes'\) needs several: set trainer.devices"):
        Store(place="processes")(vectors)
