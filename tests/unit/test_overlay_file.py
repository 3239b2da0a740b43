"""Which fresh overlay's file is ours to unlink, and in what it differs from the former one's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpcommit.block.identity import FileId
from qmpcommit.block.qcow2 import MAGIC
from qmpcommit.commit.overlay import file
from qmpcommit.commit.overlay.file import differences, remove_new


def identity(path: Path) -> FileId:
    return FileId.of(path.stat())


def test_modes_and_owners_that_differ_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for path, mode in ((mine, 0o600), (other, 0o640)):
        path.touch()
        path.chmod(mode)
    assert differences(str(mine), str(other)) == "mode 600, not 640"
    plain = os.stat

    def of_another(path: str) -> os.stat_result:
        told = list(plain(path))
        told[4:6] = [1234, 1235] if path == str(other) else told[4:6]
        return os.stat_result(told)

    mine.chmod(0o640)
    monkeypatch.setattr(os, "stat", of_another)
    us = f"{os.getuid()}:{os.getgid()}"
    assert differences(str(mine), str(other)) == f"owner {us}, not 1234:1235"


def test_only_the_very_file_that_was_made_is_unlinked(tmp_path: Path) -> None:
    made, other = tmp_path / "made", tmp_path / "other"
    made.write_bytes(b"data")
    other.write_bytes(b"data")
    assert not remove_new(str(made), identity(other), ())
    assert remove_new(str(made), identity(made), ())
    assert not made.exists()
    assert other.exists()


def test_a_folder_and_a_link_are_never_unlinked(tmp_path: Path) -> None:
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (tmp_path / "link", tmp_path, tmp_path / "none"):
        assert not remove_new(str(path), None, ())
    assert (tmp_path / "link").is_symlink()


def test_of_a_file_that_another_has_made_only_a_void_one_is_unlinked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "overlay"
    path.write_bytes(b"somebody's data")
    assert not remove_new(str(path), None, ())
    path.write_bytes(b"")

    def unreadable(path: str) -> None:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(file, "read_header", unreadable)
        assert not remove_new(str(path), None, ())
    assert MAGIC not in path.read_bytes()
    assert remove_new(str(path), None, ())
    assert not path.exists()
