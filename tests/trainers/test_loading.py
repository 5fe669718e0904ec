"""Workers that die and images that break in mid-stream."""

import json
import os
import re
import signal
import sys
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny_suite import TinySuite
from torch.utils.data import Dataset

from adamerge import InputError
from adamerge.data import Substituted, fetch, fetch_readable, labels_of
from trainers import ByEntropy, Shuffled, Stream
from trainers.evaluation import accuracy
from trainers.loading import TRIES, load
from trainers.report import Report
from trainers.streams import Part

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and kill")


class Deadly(Dataset[int]):
    """Numbers; whoever loads the fourth is killed, as often as there are letters in the file."""

    def __init__(self, left: Path) -> None:
        self.left = left

    def __getitem__(self, index: int) -> int:
        if index == 4 and (letters := self.left.read_text()):
            self.left.write_text(letters[1:])
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 9:
            raise InputError("the tenth is broken")
        return index


@posix
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_others_go_on_where_a_worker_died(tmp_path, caplog):
    left = tmp_path / "left"
    left.write_text("x")  # torch takes five seconds to see that it died
    before = signal.getsignal(signal.SIGCHLD)
    assert list(load(Deadly(left), range(2, 9), 2)) == [2, 3, 4, 5, 6, 7, 8]
    assert signal.getsignal(signal.SIGCHLD) is before
    assert caplog.text.count("A worker process that loads images died") == 1
    assert re.search("begun again at batch [2-4]", caplog.text), "whatever it had loaded ahead"


@posix
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_batch_that_kills_all_that_load_it_stops_the_run(tmp_path):
    left = tmp_path / "left"
    left.write_text("x" * 99)
    loaded = load(Deadly(left), range(3, 9), 1)
    assert next(loaded) == 3
    with pytest.raises(InputError, match=rf"died {TRIES + 1} times in a row, at batch 4 .*fewer num_workers"):
        next(loaded)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=posix)])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_what_is_wrong_with_an_item_is_said_in_its_own_words(tmp_path, workers):
    left = tmp_path / "left"
    left.write_text("")
    with pytest.raises(InputError, match=r"^the tenth is broken$"):
        list(load(Deadly(left), range(8, 11), workers))


class Torn(Dataset[tuple[torch.Tensor, int]]):
    """Images some of which can no longer be read."""

    def __init__(self, images, bad) -> None:
        self.images, self.bad = images, set(bad)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> torch.Tensor:
        return self.images.labels

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index in self.bad:
            raise InputError(f"{index}.png cannot be decoded: truncated")
        return self.images[index]


class TornSuite(TinySuite):
    def dataset(self, task, split):
        return Torn(super().dataset(task, split), [1, 5] if task == "two" else [])


def test_another_image_takes_the_place_of_one_that_cannot_be_read(caplog):
    images = TinySuite().dataset("one", "test")
    torn = Substituted(Torn(images, [1, 5]))
    got, labels = fetch(torn, [5, 3, 1, 4])
    expected, expected_labels = fetch(images, [3, 3, 3, 4])
    assert torch.equal(got, expected)
    assert torch.equal(labels, expected_labels)
    fetch(torn, [5, 4])
    assert caplog.text.count("5.png cannot be decoded: truncated: it is left out") == 1
    assert "(2 so far)" in caplog.text
    assert sorted(torn.unread) == [1, 5]
    assert torch.equal(labels_of(torn), images.labels)
    with pytest.raises(InputError, match=r"1\.png"):
        fetch(torn, [1, 5])


def test_what_cannot_be_read_is_left_out():
    images = TinySuite().dataset("one", "test")
    torn = Substituted(Torn(images, [1, 5]))
    index, got, labels = fetch_readable(torn, torch.tensor([5, 3, 1, 4]))
    assert index.tolist() == [3, 4]
    assert all(map(torch.equal, (got, labels), fetch(images, [3, 4])))
    assert [len(part) for part in fetch_readable(torn, torch.tensor([5, 1]))] == [0, 0, 0]
    with pytest.raises(InputError, match=r"5\.png"):
        fetch_readable(Torn(images, [1, 5]), torch.tensor([5, 3]))


@pytest.mark.parametrize("task_known", [True, False])
def test_an_online_stream_leaves_out_what_cannot_be_read_and_counts_nothing_twice(adapt, tmp_path, caplog, task_known):
    """69 images one by one, two of which cannot be read: those steps learn nothing, and neither is scored."""
    stream = Stream(batch_size=1, order=Shuffled(), on_bad_image="skip", task_known=task_known)
    unknown = {} if task_known else {"task_id": "inferred", "finder": ByEntropy()}
    report, seen = Report(figures=False, references=False), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, *_):
            seen.append((not batch, module.coefficients.raw.detach().clone()))

    run, trainer = adapt(100, suite=TornSuite(), stream=stream, callbacks=[report, Watch()], **unknown)
    assert trainer.global_step == 69
    assert run.finite.skipped == sum(blank for blank, _ in seen) == 2
    moved = [not torch.equal(a, b) for (_, a), (_, b) in pairwise(seen)]
    assert moved == [not blank for blank, _ in seen[1:]], "not even by what the optimiser remembers"
    assert report.online.table().sum(0)[0].tolist() == [23, 21, 23]
    assert caplog.text.count("none of its images can be read") == 2
    assert caplog.text.count("5.png cannot be decoded: truncated: it is left out") == 1
    assert json.loads((tmp_path / "results.json").read_text())["skipped_steps"] == 2
    rest = Part(TinySuite().dataset("two", "test"), [n for n in range(23) if n not in (1, 5)])
    assert report.accuracies[69]["two"] == pytest.approx(accuracy(run.scored, {"two": rest})["two"])


def test_a_run_stops_or_goes_on_as_it_was_told(adapt):
    with pytest.raises(InputError, match=r"\.png cannot be decoded"):
        adapt(steps=8, suite=TornSuite())
    _, trainer = adapt(steps=8, suite=TornSuite(), stream=Stream(batch_size=4, on_bad_image="skip"))
    assert trainer.global_step == 8
    assert set(trainer.datamodule._unread["two", "scored"]) == {1, 5}
