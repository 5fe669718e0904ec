"""What is freed stays with the process for as long as it is asked to."""

import os
import resource
import subprocess
import sys

import pytest
import torch

from adamerge.memory import kept

#: More than the C library ever takes from its own heap by default, and less.
NUMBERS, FEW = 2**24, 2**20


def faults(numbers: int = NUMBERS) -> int:
    """New pages that a large tensor touches where there were such tensors before."""
    for _ in range(4):  # a hole must be a little larger than what is put into it
        torch.ones(numbers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(numbers)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries keep their own counsel")
def test_large_tensors_come_from_memory_that_is_there_already():
    """In a process of its own: what other tests have left free would serve as well."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, __file__], env=environment, check=True, capture_output=True, text=True)
    usual, within, after, small = map(int, done.stdout.split())
    assert within < usual / 10
    assert after > usual / 2, "the usual settings did not come back"
    assert small < usual / 100, "smaller tensors come from the system since"


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "ADAMERGE_KEEP"])
def test_the_environment_turns_it_off(monkeypatch, name):
    monkeypatch.setenv(name, "262144" if name.startswith("MALLOC") else "0")
    usual = faults()
    with kept():
        assert faults() > usual / 2


if __name__ == "__main__":
    before = faults()
    with kept():
        inside = faults()
    sys.stdout.write(f"{before} {inside} {faults()} {faults(FEW)}")
