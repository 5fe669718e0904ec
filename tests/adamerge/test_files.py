"""Files are whole or not there."""

import os
import time

import pytest

from adamerge.files import STALE, flush, replacing, write_text


def test_a_file_takes_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old: μ")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert path.read_text(encoding="utf-8") == "old: μ"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_removed_when_the_file_is_written_again(tmp_path):
    left, others, fresh = (tmp_path / name for name in (".a.txt.1.tmp", ".aa.txt.1.tmp", ".a.txt.2.tmp"))
    for path in (left, others, fresh):
        path.write_text("half")
    for path in (left, others):
        os.utime(path, (time.time() - STALE - 5,) * 2)
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([fresh, others, tmp_path / "a.txt"]), "others may still be written to"


def test_files_and_folders_are_flushed(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("whole")
    synced, original = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file).st_ino), original(file)))
    flush(tmp_path / "a.txt")
    flush(tmp_path)
    assert synced == [(tmp_path / "a.txt").stat().st_ino, tmp_path.stat().st_ino]
