"""Hugging Face data sets from local folders: parquet, images, `save_to_disk`; and errors of one sentence."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from adamerge import InputError
from adamerge.data import HubData, Preprocess, check_data, fetch

NAMES = ["cat", "dog", "emu"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def picture(value: int) -> Image.Image:
    return Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8))


def rows(labels, feature=None, image=None) -> datasets.Dataset:
    """One image per label, its brightness ten times its position."""
    images = [picture(10 * position) for position in range(len(labels))]
    features = {"image": image or datasets.Image(), "label": feature or datasets.ClassLabel(names=NAMES)}
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=datasets.Features(features))


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": rows([0, 1, 2]), "test": rows([2, 0])}).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "parquet"
    folder.mkdir()
    rows([0, 1, 2]).to_parquet(folder / "train-00000.parquet")
    rows([2, 0]).to_parquet(folder / "test-00000.parquet")
    return str(folder)


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_local_folders(kind, request):
    source = HubData(request.getfixturevalue(kind))
    check_data("pets", source)
    assert source.classes == tuple(NAMES)
    assert source.splits == ("train", "test")
    dataset = source.dataset("test", Preprocess())
    images, labels = fetch(dataset, [1, 0])
    assert torch.equal(images, torch.stack([Preprocess()(picture(10)), Preprocess()(picture(0))]))
    assert labels.tolist() == [0, 2]
    assert dataset.labels.tolist() == [2, 0]
    assert source.dataset("train", Preprocess()).labels.tolist() == [0, 1, 2]


def test_folder_of_class_folders(tmp_path):
    for name, value in (("cat", 10), ("dog", 20)):
        (tmp_path / "pics" / "test" / name).mkdir(parents=True)
        picture(value).save(tmp_path / "pics" / "test" / name / "a.png")
    source = HubData(str(tmp_path / "pics"), train=None)
    check_data("pets", source)
    assert source.classes == ("cat", "dog")


def test_labels_are_read_without_decoding(saved, monkeypatch):
    dataset = HubData(saved)
    dataset.dataset("test", Preprocess())
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("decoded an image"))
    assert dataset.dataset("train", Preprocess()).labels.tolist() == [0, 1, 2]


def test_text_labels_are_sorted_over_both_splits(tmp_path):
    text = datasets.Value("string")
    data = {"train": rows(["owl", "ant"], text), "test": rows(["bee", "owl"], text)}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "text")
    source = HubData(str(tmp_path / "text"))
    assert source.classes == ("ant", "bee", "owl")
    assert source.dataset("test", Preprocess()).labels.tolist() == [1, 2]


def test_bare_integers_keep_their_values(tmp_path):
    data = {"train": rows([0, 3], datasets.Value("int32")), "test": rows([3, 3], datasets.Value("int32"))}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "ints")
    source = HubData(str(tmp_path / "ints"))
    assert source.classes == ("0", "1", "2", "3")
    assert source.dataset("test", Preprocess()).labels.tolist() == [3, 3]


def test_bytes_become_images(tmp_path):
    buffer = io.BytesIO()
    picture(30).save(buffer, "png")
    table = datasets.Dataset.from_dict({"pixels": [buffer.getvalue()], "digit": [0]})
    table.save_to_disk(tmp_path / "bytes")
    source = HubData(str(tmp_path / "bytes"), train=None, image="pixels", label="digit")
    assert torch.equal(source.dataset("test", Preprocess())[0][0], Preprocess()(picture(30)))


def test_a_format_that_was_saved_does_not_matter(tmp_path):
    rows([1]).with_format("numpy").save_to_disk(tmp_path / "formatted")
    image, label = HubData(str(tmp_path / "formatted"), train=None).dataset("test", Preprocess())[0]
    assert (image.shape, label) == ((3, 4, 4), 1)


def test_one_table_has_no_splits(tmp_path):
    rows([1]).save_to_disk(tmp_path / "one")
    with pytest.raises(InputError, match="one has no splits: name one of train and test, and give null for the other"):
        HubData(str(tmp_path / "one")).check()
    check_data("pets", HubData(str(tmp_path / "one"), train=None))


def test_splits_must_agree_on_classes(tmp_path):
    other = rows([0], datasets.ClassLabel(names=["cat", "cow", "emu"]))
    datasets.DatasetDict({"train": rows([0]), "test": other}).save_to_disk(tmp_path / "odd")
    with pytest.raises(InputError, match="class 1: expected 'dog', found 'cow'"):
        _ = HubData(str(tmp_path / "odd")).classes


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_missing_splits(kind, request):
    path = request.getfixturevalue(kind)
    with pytest.raises(InputError, match=r"split 'validation'|Unknown split \"validation\"") as error:
        HubData(path, test="validation").check()
    assert "train" in str(error.value)
    with pytest.raises(InputError, match="no train split was named"):
        HubData(path, train=None).dataset("train", Preprocess())
    with pytest.raises(InputError, match="give the name of a split"):
        HubData(path, train=None, test=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "img"}, "has no column 'img'; give image one of image, label"),
        ({"label": "class"}, "has no column 'class'; give label one of image, label"),
        ({"image": "label"}, "column 'label' holds .*, not images"),
        ({"label": "image"}, "column 'image' must hold integers or text throughout"),
    ],
)
def test_wrong_columns(saved, options, message):
    with pytest.raises(InputError, match=rf"task 'pets': .*saved.*{message}"):
        check_data("pets", HubData(saved, **options))


def test_unlabelled_and_broken_rows(tmp_path):
    rows([0, -1]).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(
        InputError, match=r"its test split has label -1 at .*unlabelled, test split, row 1; its 3 classes"
    ):
        check_data("pets", HubData(str(tmp_path / "unlabelled"), train=None))
    rows([0, None]).save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match="column 'label' must hold integers or text throughout, but has None"):
        check_data("pets", HubData(str(tmp_path / "none"), train=None))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    broken = {"image": [{"bytes": b"no image", "path": None}], "label": [0]}
    datasets.Dataset.from_dict(broken, features=features).save_to_disk(tmp_path / "broken")
    with pytest.raises(InputError, match="broken, test split, row 0 cannot be decoded: not an image of a known format"):
        check_data("pets", HubData(str(tmp_path / "broken"), train=None))


@pytest.mark.parametrize(
    ("path", "message"), [("someone/pets", "Couldn't reach 'someone/pets'"), ("/no/folder", "/no/folder")]
)
def test_what_cannot_be_opened_is_one_sentence(path, message):
    with pytest.raises(
        InputError, match=rf"{path}, split 'train', cannot be opened: .*{message}.*check the name and"
    ) as error:
        HubData(path).check()
    assert "\n" not in str(error.value)
