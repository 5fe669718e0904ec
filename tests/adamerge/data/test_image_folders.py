"""Folders of images: listing, broken files, and what is remembered of them."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adamerge import InputError
from adamerge.data import ImageFolders, Preprocess, check_data, decoding, fetch
from adamerge.files import cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded."""
    names: list[str] = []
    load = decoding._load
    monkeypatch.setattr(decoding, "_load", lambda path: names.append(path.name) or load(path))
    return names


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folders(tmp_path):
    """Two splits with the classes `cat` and `dog` of two images each."""
    values = iter(range(0, 80, 10))
    for split in ("train", "test"):
        for name in ("dog/b.png", "dog/deep/a.bmp", "cat/2.png", "cat/10.PNG"):
            save(tmp_path / split / name, next(values))
    return tmp_path / "train", tmp_path / "test"


def test_files_come_by_class_and_path(folders):
    source = ImageFolders(*folders)
    dataset = source.dataset("test", Preprocess())
    assert source.classes == ("cat", "dog")
    assert [path.relative_to(folders[1]).as_posix() for path in dataset.files] == [
        "cat/10.PNG",
        "cat/2.png",
        "dog/b.png",
        "dog/deep/a.bmp",
    ]
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    images, labels = fetch(dataset, [2, 0])
    assert torch.equal(images[0], Preprocess()(np.full((4, 4), 40, dtype=np.uint8)))
    assert labels.tolist() == [1, 0]
    check_data("pets", source)


def test_what_is_no_image_is_left_out(folders):
    for name in ("notes.txt", "cat/labels.csv", "cat/.hidden.png", "cat/.thumbs/1.png", ".git/x.png"):
        path = folders[1] / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    source = ImageFolders(test=folders[1])
    source.check()
    assert source.classes == ("cat", "dog")
    assert len(source.dataset("test", Preprocess())) == 4


def test_one_split(folders):
    source = ImageFolders(test=str(folders[1]))
    assert source.splits == ("test",)
    with pytest.raises(InputError, match=r"no train folder was given; there is test=.*test"):
        source.dataset("train", Preprocess())
    with pytest.raises(InputError, match="give train, test or both"):
        ImageFolders()


def test_splits_must_agree_on_classes(folders):
    save(folders[1] / "cow" / "a.png")
    with pytest.raises(
        InputError,
        match=r"test has not the classes of .*train: expected 2 classes, found 3; class 1: expected 'dog', found 'cow'",
    ):
        _ = ImageFolders(*folders).classes
    with pytest.raises(InputError, match=r"task 'pets': .*expected 2 classes, found 3"):
        check_data("pets", ImageFolders(*folders))


def test_missing_and_empty_folders(tmp_path):
    source = ImageFolders(test=tmp_path / "none")
    with pytest.raises(InputError, match=r"no such folder: .*none"):
        source.check()
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"bare has no subfolders; expected one per class"):
        ImageFolders(test=tmp_path / "bare").check()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match="task 'pets': its test split has no image"):
        check_data("pets", ImageFolders(test=tmp_path / "hollow"))


def spoil(folders) -> list[Path]:
    """Make three files undecodable, each in its own way."""
    text, cut, empty = folders[0] / "cat/text.jpg", folders[0] / "dog/cut.png", folders[1] / "cat/empty.png"
    text.write_text("this is not an image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    empty.touch()
    return [text, cut, empty]


def test_stop_names_the_bad_files(folders):
    spoil(folders)
    source = ImageFolders(*folders)
    message = (
        r"task 'pets': 3 of 11 images cannot be decoded: .*text\.jpg \(not an image of a known format\); "
        r".*cut\.png \(image file is truncated.*\); .*empty\.png \(not an image of a known format\)\. Replace them, or"
    )
    with pytest.raises(InputError, match=message):
        check_data("pets", source)
    assert source.skipped == 0
    with pytest.raises(InputError, match=r"text\.jpg cannot be decoded: not an image"):
        source.dataset("train", Preprocess())[2]


def test_only_the_first_bad_files_are_listed(folders):
    for number in range(3, 8):
        (folders[1] / "cat" / f"{number}.png").touch()
    with pytest.raises(InputError, match=r"5 of 13 images .*/3\.png .*/4\.png .*/5\.png \([^;]*; \.\.\.\. Replace"):
        ImageFolders(*folders).check()


def test_skip_leaves_them_out_with_one_warning(folders, caplog):
    spoil(folders)
    source = ImageFolders(*folders, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        check_data("pets", source)
        train, test = (source.dataset(split, Preprocess()) for split in ("train", "test"))
    assert source.skipped == 3
    assert (len(train), len(test)) == (4, 4)
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert all(len(fetch(dataset, range(4))[0]) == 4 for dataset in (train, test))
    (record,) = caplog.records
    assert record.getMessage().startswith("3 images cannot be decoded and are left out: ")
    assert "cut.png (image file is truncated" in record.getMessage()


def test_skip_without_a_check(folders):
    spoil(folders)
    assert len(ImageFolders(*folders, on_bad_image="skip").dataset("train", Preprocess())) == 4


def test_good_files_are_decoded_once(folders, decoded):
    ImageFolders(*folders).check()
    assert len(decoded) == 8
    decoded.clear()
    ImageFolders(*folders).check()
    assert decoded == []


def test_changed_new_and_bad_files_are_decoded_again(folders, decoded):
    ImageFolders(*folders).check()
    decoded.clear()
    bad = folders[1] / "cat" / "bad.png"
    bad.touch()
    changed = save(folders[1] / "cat" / "2.png", 200)
    os.utime(changed, ns=(1, 1))
    save(folders[0] / "cat" / "new.png")
    for again in (["2.png", "bad.png", "new.png"], ["bad.png"]):
        with pytest.raises(InputError, match="1 of 10 images"):
            ImageFolders(*folders).check()
        assert sorted(decoded) == again
        decoded.clear()
    save(bad)  # mended
    ImageFolders(*folders).check()
    assert decoded == ["bad.png"]


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"cat/2.png": "x"}', "\x00"])
def test_spoilt_memory_only_costs_time(folders, decoded, content):
    ImageFolders(*folders).check()
    for memory in (cache_folder() / "images").iterdir():
        assert isinstance(json.loads(memory.read_text()), dict)
        memory.write_text(content)
    decoded.clear()
    ImageFolders(*folders).check()
    assert len(decoded) == 8


def test_a_cache_that_cannot_be_written_is_no_error(folders, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "file"))
    ImageFolders(*folders).check()


def test_an_interrupted_check_keeps_what_it_did(folders, monkeypatch, decoded):
    load, calls = decoding._load, iter(range(100))

    def interrupted(path):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(decoding, "_load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ImageFolders(*folders).check()
    monkeypatch.setattr(decoding, "_load", load)
    decoded.clear()
    ImageFolders(*folders).check()
    assert 0 < len(decoded) < 8


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("ADAMERGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/adamerge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "adamerge"


def test_wrong_option():
    with pytest.raises(InputError, match="on_bad_image is 'stop' or 'skip', got 'ignore'"):
        ImageFolders(test="x", on_bad_image="ignore")
