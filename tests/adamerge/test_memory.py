"""What is freed stays with the process for as long as it is asked to."""

import resource
import sys

import pytest
import torch

from adamerge.memory import kept

#: More than the C library ever takes from its own heap by default.
NUMBERS = 2**24


def faults() -> int:
    """New pages that a large tensor touches where there were such tensors before."""
    for _ in range(4):  # a hole must be a little larger than what is put into it
        torch.ones(NUMBERS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(NUMBERS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries keep their own counsel")
def test_large_tensors_come_from_memory_that_is_there_already(monkeypatch):
    for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    usual = faults()
    with kept():
        assert faults() < usual / 10
    assert faults() > usual / 2, "the usual settings did not come back"


def test_settings_of_the_environment_hold(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    usual = faults()
    with kept():
        assert faults() > usual / 2
