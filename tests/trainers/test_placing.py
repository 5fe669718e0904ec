"""Images in 8 bits on the device that computes: the same floats, read once, where they fit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_adaptation import learned
from tiny_suite import TinySuite
from torch.utils import backend_registration

from adamerge import InputError
from adamerge.corruptions import GaussianNoise, Jpeg
from adamerge.data import ArrayImages, Substituted, fetch, fetch_readable
from adamerge.data.base import Images
from trainers import ByEntropy, Shuffled, Stream, placing
from trainers.evaluation import accuracy
from trainers.loaders import EvalChunks, StepLoader
from trainers.placing import Placed, in_bytes, place
from trainers.streams import Part, StreamSteps

CPU = torch.device("cpu")
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


class Counted(ArrayImages):
    """Images that note when they are read, and of which one cannot be."""

    def __init__(self, images, bad=()) -> None:
        super().__init__(images.images, images.labels, images.preprocess)
        self.read, self.bad = [], set(bad)

    def batch(self, indices):
        self.read += indices.tolist()
        if odd := self.bad.intersection(indices.tolist()):
            raise InputError(f"{min(odd)}.png cannot be decoded")
        return super().batch(indices)


class Loose(Images):
    """Files, of which nobody knows the size."""

    def image(self, index):
        return torch.full((4 + index % 2, 4, 3), index, dtype=torch.uint8)


def on_cpu(dataset, keep: bool, workers: int = 0) -> Placed:
    found = Placed(in_bytes(dataset), CPU, workers)
    found.keep = keep
    return found


@pytest.mark.parametrize("keep", [True, False])
def test_floats_are_those_of_the_data_set_and_what_stays_is_read_once(suite, keep):
    images = Counted(suite.dataset("one", "test"))
    near = on_cpu(images, keep)
    near.dataset.read = []
    for index in ([3, 5, 3], [5, 0], [], [22]):
        for mine, theirs in zip(fetch(near, index), images.batch(torch.tensor(index).long()), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.dtype == theirs.dtype
    assert near.dataset.read == ([3, 5, 0, 22] if keep else [3, 5, 3, 5, 0, 22])
    assert near.nbytes == 23 * 4 * 4 * 3
    assert (near._kept is not None) == keep
    assert near._kept is None or near._kept.dtype == torch.uint8


def test_evaluation_begins_what_a_step_goes_on_with(suite):
    """A tensor that inference mode made could not be changed outside of it."""
    near = on_cpu(suite.dataset("one", "test"), True)
    with torch.inference_mode():
        near.batch(torch.tensor([1]))
    assert near.batch(torch.tensor([2, 1]))[0].equal(suite.dataset("one", "test").batch(torch.tensor([2, 1]))[0])


@posix
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_worker_processes_give_bytes_that_become_floats_where_they_arrive(suite):
    """Three views of the same stream: as it was, moved at each step, and kept."""
    datasets = {task: suite.dataset(task, "test") for task in suite.tasks}
    moved, kept = ({t: on_cpu(d, keep, 1) for t, d in datasets.items()} for keep in (False, True))
    plain = list(StepLoader(StreamSteps(datasets, 4, 0), 4, 0))
    for near in (moved, kept):
        steps = StreamSteps(near, 4, 0)
        assert steps.at_hand == (near is kept)
        for mine, theirs in zip(StepLoader(steps, 4, 1), plain, strict=True):
            assert all(mine[task]["images"].equal(theirs[task]["images"]) for task in theirs)
    assert kept["one"]._there.all(), "processes read all images at once"
    chunks = (EvalChunks(each["two"], 10) for each in (datasets, moved, kept))
    plain, *others = ([images for images, _ in StepLoader(each, 3, 1)] for each in chunks)
    for other in others:
        assert all(map(torch.equal, other, plain))


@posix
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_still_told_and_left_out(suite, workers):
    near = Substituted(on_cpu(Counted(suite.dataset("two", "test"), bad=[5]), True, workers))
    index, images, _ = fetch_readable(near, torch.tensor([4, 5, 6]))
    assert index.tolist() == [4, 6]
    assert images.equal(suite.dataset("two", "test").batch(index)[0])
    assert list(near.unread) == [5]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"held_out": 0.4, "half": 1},
        {"train_split": "train", "per_task": 9, "corruptions": [Jpeg()]},
        {"corruptions": [GaussianNoise(2), Jpeg(5)], "order": Shuffled()},
        {"order": Shuffled(), "task_known": False, "on_bad_image": "skip"},
    ],
    ids=["plain", "parts", "train", "corrupted", "untold"],
)
def test_a_run_ends_with_the_same_bits(adapt, kwargs):
    ended = []
    for keep in (None, True):
        stream = Stream(batch_size=4, images_on_device=keep, **kwargs)
        more = {} if stream.task_known else {"task_id": "inferred", "finder": ByEntropy()}
        run, trainer = adapt(7, stream=stream, **more)
        stream.trainer = trainer
        ended.append((learned(run), accuracy(run.scored, stream.eval_tasks())))
        placed = [isinstance(placing.placed(dataset), Placed) for dataset in stream.eval_tasks().values()]
        assert all(placed) if keep else not any(placed)
    assert torch.equal(ended[0][0], ended[1][0])
    assert ended[0][1] == ended[1][1]


def parts(suite, task="one"):
    whole = suite.dataset(task, "test")
    adapted = Part(in_bytes(whole), torch.arange(10))
    return {task: (adapted, adapted)}


@pytest.mark.parametrize(("free", "keep", "stays"), [
    (960, None, True), (959, None, False), (0, True, True), (10**6, False, False),
])  # fmt: skip
def test_images_stay_on_a_gpu_where_they_take_half_of_what_is_free(suite, monkeypatch, caplog, free, keep, stays):
    monkeypatch.setattr(placing, "free_memory", lambda device: free)
    with caplog.at_level("INFO"):
        adapted, scored = place(parts(suite), torch.device("cuda"), 0, keep)["one"]
    assert adapted is scored, "none is there twice"
    assert adapted.keep == stays
    assert adapted.nbytes == 480
    assert ("for the rest" in caplog.text) == (stays and keep is None)


def test_elsewhere_they_stay_if_asked_to(suite):
    assert not place(parts(suite), CPU, 0, None)["one"][0].keep
    assert place(parts(suite), CPU, 0, True)["one"][0].keep


def test_images_of_any_size_move_at_each_step(suite):
    loose = in_bytes(Loose(torch.arange(4), suite.dataset("one", "test").preprocess))
    near, _ = place({"one": (loose, loose)}, CPU, 0, None)["one"]
    assert near.batch(torch.tensor([1]))[0].shape == (1, 3, 5, 4)
    with pytest.raises(InputError, match="images of different sizes cannot stay on a device: give preprocess a size"):
        place({"one": (loose, loose)}, CPU, 0, True)


def test_data_sets_of_others_are_left_as_they_are():
    other = torch.utils.data.TensorDataset(torch.ones(2, 3, 4, 4), torch.zeros(2))
    assert in_bytes(other) is other
    assert place({"one": (other, other)}, CPU, 0, True) == {"one": (other, other)}


ELSEWHERE = """
from elsewhere import *
from test_methods import build
module, stream = build("adamerging")
for keep in (True, False):
    stream.images_on_device = keep
    with elsewhere():
        trainer().fit(module, datamodule=stream)
        module.to(DEVICE)  # where it was while it ran
        near, _ = stream._parts()["one"]
        images, labels = near.batch(torch.tensor([3, 1]))
    assert (near.keep, images.device, labels.device.type) == (keep, DEVICE, "cpu")
    assert not keep or near._kept.device == DEVICE
    assert torch.equal(images.held, module.suite.dataset("one", "test").batch(torch.tensor([3, 1]))[0])
"""


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs a newer torch"
)
def test_a_run_on_a_device_that_refuses_tensors_of_the_cpu():
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_bytes_become_the_same_floats_on_a_gpu(suite):
    images, cuda = suite.dataset("one", "test"), torch.device("cuda")
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert images.preprocess.normalize(pixels.to(cuda)).cpu().equal(images.preprocess.normalize(pixels))
    for keep in (True, False):
        near = Placed(in_bytes(images), cuda)
        near.keep = keep
        got, labels = near.batch(torch.tensor([4, 2, 4]))
        assert got.is_cuda
        assert not labels.is_cuda
        assert got.cpu().equal(images.batch(torch.tensor([4, 2, 4]))[0])
    assert placing.free_memory(cuda) <= torch.cuda.get_device_properties(cuda).total_memory


@pytest.mark.gpu
def test_a_run_on_a_gpu_keeps_its_images_there(adapt, caplog):
    with caplog.at_level("INFO"):
        runs = [
            adapt(
                5, suite=TinySuite(), stream=Stream(batch_size=4, images_on_device=keep), trainer={"accelerator": "gpu"}
            )
            for keep in (None, False)
        ]
    assert "for the rest" in caplog.text
    torch.testing.assert_close(*(learned(run) for run, _ in runs))
