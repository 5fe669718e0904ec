"""Data sets of torch and torchvision, built or still to be built."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.transforms import ToTensor

from adamerge import InputError
from adamerge.data import Npz, Preprocess, TorchData, check_data, fetch

LABELS = [2, 0, 1, 1]


class Pictures(Dataset):
    """Four images of 3 classes; keeps its labels under the given names and counts how many images it decodes."""

    def __init__(self, truth=LABELS, **attributes):
        self.truth, self.decoded = truth, 0
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.truth)

    def __getitem__(self, index):
        self.decoded += 1
        return Image.new("RGB", (4, 4), (index, 0, 0)), self.truth[index]


class Endless(IterableDataset):
    def __iter__(self):
        yield from Pictures()


def test_images_and_labels():
    dataset = TorchData(test=Pictures(targets=LABELS)).dataset("test", Preprocess(size=2))
    images, labels = fetch(dataset, [3, 0])
    assert images.shape == (2, 3, 2, 2)
    assert (images[:, 0, 0, 0] * 127.5 + 127.5).round().tolist() == [3, 0]
    assert labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": LABELS},
        {"targets": torch.tensor(LABELS)},
        {"labels": np.array(LABELS, dtype=np.uint8)},
        {"_labels": LABELS},
        {"y": LABELS},
        {"_samples": [("file", label) for label in LABELS]},
        {"samples": [("file", label) for label in LABELS]},
    ],
)
def test_kept_labels_spare_the_decoding(attributes):
    data = Pictures(**attributes)
    assert TorchData(test=data).dataset("test", Preprocess()).labels.tolist() == LABELS
    assert data.decoded <= 2  # the first and the last, to see that these are the labels of the items


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"targets": [0, 0, 0, 0]},
        {"targets": [2, 0, 1]},
        {"targets": ["a", "b", "c", "d"]},
        {"labels": lambda: LABELS},
        {"targets": LABELS, "target_transform": str},
        {"samples": ["a.png"]},
        {"y": [[1], [2, 3]]},
    ],
)
def test_otherwise_labels_are_read_item_by_item(attributes):
    assert TorchData(test=Pictures(**attributes)).dataset("test", Preprocess()).labels.tolist() == LABELS


def test_classes():
    assert TorchData(test=Pictures(), classes=["a", "b", "c"]).classes == ("a", "b", "c")
    assert TorchData(test=Pictures(classes=["x", "y", "z"])).classes == ("x", "y", "z")
    assert TorchData(test=Pictures(categories=["x", "y", "z"])).classes == ("x", "y", "z")
    assert TorchData(test=Pictures(classes=[("cock", "hen"), ("emu",), ("owl",)])).classes == (
        "cock, hen",
        "emu",
        "owl",
    )
    assert TorchData(train=Pictures([0, 1]), test=Pictures([0, 2])).classes == ("0", "1", "2")
    with pytest.raises(InputError, match=r"its test data set has not the classes .* class 1: expected 'b', found 'c'"):
        _ = TorchData(train=Pictures(classes=["a", "b"]), test=Pictures(classes=["a", "c"])).classes


def test_a_function_is_called_when_first_used():
    calls = []

    def opener():
        calls.append(1)
        return Pictures(classes=["a", "b", "c"])

    source = TorchData(test=opener)
    assert calls == []
    check_data("pets", source)
    assert (source.classes, len(source.dataset("test", Preprocess())), calls) == (("a", "b", "c"), 4, [1])


def test_failing_function():
    source = TorchData(train=Pictures(), test=lambda: torchvision.datasets.MNIST("/no/such/folder"))
    with pytest.raises(InputError, match="task 'mnist': the test data set cannot be opened: Dataset not found"):
        check_data("mnist", source)


def test_missing_split():
    with pytest.raises(InputError, match="no train data set was given; there is only test"):
        TorchData(test=Pictures()).dataset("train", Preprocess())
    with pytest.raises(InputError, match="give train, test or both"):
        TorchData()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Pictures([]), "its test split has no image"),
        (Pictures([0, -1, 1]), "its test split has label -1 at Pictures, test split, image 1; its 2 classes"),
        (Pictures(["a", "b"]), r"Pictures must give \(image, integer label\); its first label is 'a'"),
        (Endless(), "Endless has no length"),
    ],
)
def test_check_names_the_culprit(data, message):
    with pytest.raises(InputError, match=rf"task 'pets': .*{message}"):
        check_data("pets", TorchData(test=data))


@pytest.fixture
def root(shared):
    return shared / "data" / "torchvision"


def test_real_mnist_equals_the_arrays(root, shared):
    kinds = torchvision.datasets.MNIST
    source = TorchData(kinds(root, train=True, download=False), lambda: kinds(root, train=False, download=False))
    check_data("mnist", source)
    assert source.classes[:2] == ("0 - zero", "1 - one")
    dataset = source.dataset("test", Preprocess())
    images, labels = fetch(dataset, torch.arange(1000))
    assert images.shape[:2] == (1000, 3)
    assert torch.equal(images[:, 0], images[:, 2])
    arrays = Npz(shared / "data" / "vision" / "mnist.npz").dataset("test", Preprocess())
    assert sorted(labels.tolist()) == sorted(arrays.labels.tolist())


def test_a_transform_of_ones_own_is_refused(root):
    data = torchvision.datasets.MNIST(root, train=False, transform=ToTensor())
    with pytest.raises(InputError, match=r"task 'mnist': .*got float32 \[1, .*\]; give them without a transform"):
        check_data("mnist", TorchData(test=data))


def test_part_of_a_data_set(root):
    data = Subset(torchvision.datasets.FashionMNIST(root, train=False), range(20))
    source = TorchData(test=data, classes=torchvision.datasets.FashionMNIST.classes)
    check_data("clothes", source)
    assert len(source.dataset("test", Preprocess()).labels) == 20
