"""Arrays, npz files, and the helpers that every data set goes through: fetch, labels, checks and the held-out split."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge import InputError
from adamerge.data import ArrayImages, Npz, Preprocess, check_data, fetch, labels_of, split_held_out

NAMES = ["cat", "dog", "emu"]


def arrays(count: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return images, np.arange(count) % len(NAMES)


@pytest.fixture
def npz(tmp_path):
    """Write an npz file with two splits and three classes, some entries replaced or, by `None`, left out."""

    def write(**changes):
        (x_train, y_train), (x_test, y_test) = arrays(6), arrays(5, seed=1)
        entries = {
            "x_train": x_train,
            "y_train": y_train,
            "x_test": x_test,
            "y_test": y_test,
            "classes": np.array(NAMES),
        }
        kept = {name: value for name, value in (entries | changes).items() if value is not None}
        np.savez(tmp_path / "animals.npz", **kept)
        return tmp_path / "animals.npz"

    return write


class Plain(Dataset[tuple[Tensor, int]]):
    """A data set that offers neither `batch` nor `labels`, with an image per shape."""

    def __init__(self, shapes, label=1):
        self.shapes, self.label = shapes, label

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        return torch.full(self.shapes[index], float(index)), self.label


class TestArrayImages:
    def test_items_and_batches_agree(self):
        dataset = ArrayImages(*arrays(), Preprocess())
        images, labels = fetch(dataset, torch.tensor([4, 0, 4]))
        items = [dataset[4], dataset[0], dataset[4]]
        assert torch.equal(images, torch.stack([image for image, _ in items]))
        assert labels.tolist() == [label for _, label in items] == [1, 0, 1]

    def test_is_a_sequence(self):
        dataset = ArrayImages(*arrays(), Preprocess())
        assert len(dataset) == len(list(dataset)) == 6
        assert dataset.labels.dtype == torch.int64

    def test_takes_tensors_and_small_integers(self):
        images, labels = arrays()
        dataset = ArrayImages(torch.tensor(images), labels.astype(np.uint8), Preprocess())
        assert torch.equal(dataset[2][0], ArrayImages(images, labels, Preprocess())[2][0])
        assert dataset.labels.dtype == torch.int64

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (
                np.zeros((2, 4, 4, 3)),
                np.zeros(2, dtype=int),
                r"mine: expected images as uint8 .* got float64 \[2, 4, 4, 3\]",
            ),
            (np.zeros((2, 3, 4, 4), dtype=np.uint8), np.zeros(2, dtype=int), r"got uint8 \[2, 3, 4, 4\]"),
            (
                np.zeros((2, 4, 4), dtype=np.uint8),
                np.zeros(3, dtype=int),
                r"expected 2 integer labels, got int64 \[3\]",
            ),
            (np.zeros((2, 4, 4), dtype=np.uint8), np.zeros(2), r"expected 2 integer labels, got float64 \[2\]"),
        ],
    )
    def test_misfits_are_refused(self, images, labels, message):
        with pytest.raises(InputError, match=message):
            ArrayImages(images, labels, Preprocess(), name="mine")


class TestFetch:
    def test_stacks_items(self):
        images, labels = fetch(Plain([(3, 2, 2)] * 3), [2, 0])
        assert images[:, 0, 0, 0].tolist() == [2.0, 0.0]
        assert labels.tolist() == [1, 1]
        assert labels.dtype == torch.int64

    @pytest.mark.parametrize(
        "dataset", [Plain([(3, 2, 5)] * 3), ArrayImages(np.zeros((3, 2, 5), np.uint8), np.zeros(3, int), Preprocess())]
    )
    def test_nothing_has_the_shape_of_something(self, dataset):
        images, labels = fetch(dataset, [])
        assert images.shape == (0, 3, 2, 5)
        assert labels.shape == (0,)
        assert labels.dtype == torch.int64

    def test_sizes_that_differ_are_refused(self):
        dataset = Plain([(3, 2, 2), (3, 2, 2), (3, 2, 4)])
        with pytest.raises(
            InputError, match=r"images 1 and 2 differ in shape, \[3, 2, 2\] and \[3, 2, 4\]: give preprocess"
        ):
            fetch(dataset, [1, 0, 2])


class TestNpz:
    def test_reads_both_splits(self, npz):
        source = Npz(npz())
        assert source.splits == ("train", "test")
        assert source.classes == tuple(NAMES)
        for split, (images, labels) in {"train": arrays(6), "test": arrays(5, seed=1)}.items():
            dataset = source.dataset(split, Preprocess())
            assert torch.equal(fetch(dataset, range(len(images)))[0], Preprocess().batch(images))
            assert dataset.labels.tolist() == labels.tolist()

    def test_grayscale(self, npz):
        images = arrays(5)[0][..., 0]
        image, _ = Npz(npz(x_test=images)).dataset("test", Preprocess())[1]
        assert torch.equal(image, Preprocess()(images[1]))

    def test_one_split_is_enough(self, npz):
        source = Npz(npz(x_train=None, y_train=None))
        assert source.splits == ("test",)
        check_data("pets", source)
        with pytest.raises(InputError, match=r"animals.npz has no x_train; it holds classes, x_test, y_test"):
            source.dataset("train", Preprocess())

    def test_is_cheap_to_build(self, tmp_path):
        source = Npz(tmp_path / "none.npz")
        for use in (source.check, lambda: source.classes, lambda: source.dataset("test", Preprocess())):
            with pytest.raises(InputError, match=r"no such file: .*none\.npz"):
                use()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"classes": None}, "has no classes"),
            ({"classes": np.arange(3)}, r"classes must be a list of names, got int64 \[3\]"),
            ({"y_test": None}, "has no y_test"),
            ({"y_test": np.arange(4)}, r"animals.npz, test split: expected 5 integer labels, got int64 \[4\]"),
            ({"x_test": None, "x_train": None}, "has neither x_train nor x_test; it holds classes, y_test, y_train"),
            (
                {"y_test": np.array([0, 1, 3, 2, 7])},
                r"its test split has label 3 at .*animals.npz, test split, image 2 and 1 more",
            ),
            (
                {"y_train": np.array([0, 0, 0, 0, 0, -1])},
                r"train split has label -1 at .*image 5; its 3 classes are 0 to 2",
            ),
            ({"x_test": arrays(0)[0], "y_test": arrays(0)[1]}, "its test split has no image"),
        ],
    )
    def test_check_names_task_and_culprit(self, npz, changes, message):
        with pytest.raises(InputError, match=rf"task 'pets': .*{message}"):
            check_data("pets", Npz(npz(**changes)))

    def test_objects_are_never_unpickled(self, npz):
        with pytest.raises(InputError, match=r"animals.npz: y_test cannot be read: Object arrays cannot be loaded"):
            Npz(npz(y_test=np.array([object()] * 5))).dataset("test", Preprocess())

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x80\x04junk"])
    def test_broken_files_are_named(self, tmp_path, content):
        path = tmp_path / "broken.npz"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"broken\.npz is no npz file, or truncated"):
            Npz(path).check()

    def test_damaged_arrays_are_named(self, npz):
        path = npz()
        content = path.read_bytes()
        place = content.index(arrays(5, seed=1)[0].tobytes())
        path.write_bytes(content[:place] + bytes(8) + content[place + 8 :])
        with pytest.raises(InputError, match=r"animals.npz: x_test cannot be read: Bad CRC-32"):
            Npz(path).check()

    def test_truncated_file(self, npz):
        path = npz()
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(InputError, match=r"animals\.npz is no npz file, or truncated"):
            Npz(path).check()

    def test_one_bare_array_is_refused(self, tmp_path):
        np.save(tmp_path / "x.npy", arrays()[0])
        with pytest.raises(InputError, match=r"x.npy is no npz file"):
            Npz(tmp_path / "x.npy").check()

    def test_real_digits(self, shared):
        source = Npz(shared / "data" / "vision" / "mnist.npz")
        check_data("mnist", source)
        images, labels = fetch(source.dataset("test", Preprocess()), range(1000))
        assert images.shape == (1000, 3, 32, 32)
        assert images.min() == -1
        assert images.max() == 1
        assert labels.bincount().min() > 50


class TestCheckData:
    def test_plain_data_sets(self):
        check_data("shapes", Plain([(3, 2, 2)] * 2), ["a", "b"])
        with pytest.raises(InputError, match="task 'shapes': its data set has label 1 at image 0 and 1 more such"):
            check_data("shapes", Plain([(3, 2, 2)] * 2), ["a"])
        with pytest.raises(InputError, match="task 'shapes': its data set has no image"):
            check_data("shapes", Plain([]), ["a"])

    def test_fewer_classes_than_the_data_has(self, npz):
        with pytest.raises(InputError, match=r"label 2 .* its 2 classes are 0 to 1"):
            check_data("pets", Npz(npz()), NAMES[:2])

    def test_labels_of_a_plain_data_set(self):
        assert labels_of(Plain([(3, 2, 2)] * 3)).tolist() == [1, 1, 1]
        assert labels_of(Plain([])).dtype == torch.int64


class TestSplitHeldOut:
    @pytest.mark.parametrize("length", [2, 3, 10, 1000])
    @pytest.mark.parametrize("fraction", [0.0, 0.001, 0.25, 0.5, 0.999])
    def test_is_a_partition(self, length, fraction):
        adapt, held_out = split_held_out(length, fraction, seed=3)
        assert torch.cat([adapt, held_out]).sort().values.tolist() == list(range(length))
        assert adapt.tolist() == sorted(adapt.tolist())
        assert len(held_out) == (max(1, min(length - 1, round(fraction * length))) if fraction else 0)
        assert adapt.dtype == held_out.dtype == torch.int64

    def test_depends_on_its_arguments_alone(self):
        torch.manual_seed(1)
        first = split_held_out(100, 0.3, seed=5)
        torch.manual_seed(2)
        again, other = split_held_out(100, 0.3, seed=5), split_held_out(100, 0.3, seed=6)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[1], other[1])

    @pytest.mark.parametrize(
        ("length", "fraction", "message"), [(10, 1.0, "got 1.0"), (10, -0.1, "got -0.1"), (1, 0.5, "1 image")]
    )
    def test_impossible_splits_are_refused(self, length, fraction, message):
        with pytest.raises(InputError, match=message):
            split_held_out(length, fraction, seed=0)
