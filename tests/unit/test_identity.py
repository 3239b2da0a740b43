"""What the room of identity says where little can be known; this process is looked at itself."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from qmpcommit.block import identity
from qmpcommit.block.chain import read_disks
from qmpcommit.block.graph import build_graph, given_names, working_directory
from qmpcommit.block.identity import OpenFiles, all_told_where, astray, storage, unnamed
from tests.unit.test_chain import edges, node

ME = os.getpid()


def test_without_a_process_nothing_is_claimed(folder: Path) -> None:
    for pid, said in ((None, "not known to run"), (ME, "has none of its files open")):
        told = OpenFiles(pid, [str(folder / "x")]).named(str(folder / "x"))
        assert (told.verdict, told.astray) == ("unknown", False)
        assert said in told.reason
    assert working_directory(None) is None
    assert working_directory(1 << 30) is None


def test_a_file_of_a_process_that_can_not_be_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "x").touch()
    monkeypatch.setattr(identity, "open_files", lambda pid: {})
    told = OpenFiles(ME, [str(folder / "x")]).named(str(folder / "x"))
    assert (told.verdict, "can't be looked at" in told.reason) == ("unknown", True)
    monkeypatch.setattr(identity, "is_locked", lambda path: True)
    assert OpenFiles(ME, []).named(str(folder / "x")).verdict == "same"


@pytest.mark.parametrize("view", ["moved", "hidden", "own root"])
def test_what_a_name_leads_to_in_another_view(
    view: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = folder / "x", folder / "y"
    path.touch()
    other.touch()
    with path.open(), other.open():
        names = [str(path), str(other)]
        if view == "moved":
            monkeypatch.setattr(identity, "_root", lambda pid: "")
            path.rename(folder / "z")
            told = OpenFiles(ME, names).named(str(path))
            assert (told.verdict, str(folder / "z") in told.reason) == ("gone", True)
            path.touch()
            assert OpenFiles(ME, names).named(str(path)).verdict == "other"
        elif view == "hidden":
            monkeypatch.setattr(identity, "_root", lambda pid: None)
            assert OpenFiles(ME, names).named(str(path)).verdict == "same"
            told = OpenFiles(ME, names).named(str(folder / "z"))
            assert (told.verdict, told.astray) == ("unknown", True)
        else:  # changed since it opened the file, which is found from here
            monkeypatch.setattr(identity, "_root", lambda pid: str(folder / "nowhere"))
            assert OpenFiles(ME, names).named(str(path)).verdict == "same"
            (folder / "loop").symlink_to("/loop")
            monkeypatch.setattr(identity, "_root", lambda pid: str(folder))
            assert OpenFiles(ME, names).named("/loop").verdict == "gone"
            link = os.path.relpath(path)
            assert OpenFiles(ME, names).named(link).verdict == "same"


def test_a_name_that_is_another_file_in_qemus_own_root(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a mount namespace: under the same name there is another file here, or none."""
    path, jail = folder / "x", folder / "jail"
    there = Path(f"{jail}{path}")
    there.parent.mkdir(parents=True)
    there.touch()
    monkeypatch.setattr(identity, "_root", lambda pid: str(jail))
    with there.open():
        for here in (False, True):
            if here:
                path.touch()
            told = OpenFiles(ME, [str(path)]).named(str(path))
            assert (told.verdict, told.here, told.astray) == ("same", "", True)
            place = identity.locate(str(path), pid=ME)
            assert place.path == str(there)
        assert "regular file" in identity.locate(".", pid=ME).reason  # from its own folder
    monkeypatch.setattr(identity, "_root", lambda pid: None)
    assert "can't be read here" in identity.locate(str(path), pid=ME).reason


def test_a_name_that_is_a_processs_own(folder: Path) -> None:
    with (folder / "x").open("w") as x, subprocess.Popen(["sleep", "60"], stdin=x) as process:
        opened = OpenFiles(process.pid, ["/dev/fd/0", "/proc/self/fd/0"])
        for name in ("/dev/fd/0", "/proc/self/fd/0"):
            told = opened.named(name)
            assert (told.verdict, told.here, told.astray) == ("same", "", True)
        process.kill()


def test_a_working_directory_that_was_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"], cwd=tmp_path) as process:
        assert working_directory(process.pid) == str(tmp_path)
        tmp_path.rmdir()
        assert working_directory(process.pid) is None
        process.kill()


def test_files_that_were_given_open(folder: Path) -> None:
    path, other = folder / "x", folder / "y"
    path.touch()
    other.touch()
    with path.open() as first, path.open() as second, other.open() as third:
        sets = {
            "/dev/fdset/1": (first.fileno(), second.fileno()),
            "/dev/fdset/2": (first.fileno(), third.fileno()),
            "/dev/fdset/3": (),
        }
        assert given_names(sets, ME) == {"/dev/fdset/1": str(path)}
        opened = OpenFiles(ME, [str(path)], fdsets=sets)
        told = opened.named("/dev/fdset/1")
        assert (told.verdict, told.here, told.astray) == ("same", str(path), True)
        for name in ("/dev/fdset/2", "/dev/fdset/3"):
            assert opened.named(name).verdict == "unknown"
        path.rename(folder / "z")
        assert opened.named("/dev/fdset/1").here == str(folder / "z")
        (folder / "z").unlink()
        assert opened.named("/dev/fdset/1").verdict == "gone"
        assert given_names(sets, ME) == {}


def test_where_the_names_of_a_graph_lead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    path = folder / "x"
    path.touch()
    nodes = [node("top", "qcow2", "x"), node("f", "file", "x"), node("n", "nbd", "nbd://h:1/x")]
    graph = build_graph(nodes, [], [], edges("top f file", "top n data-file"))
    assert [each.name for each in storage(graph, "top")] == ["n", "f"]
    assert storage(graph, "none") == []
    unknown = OpenFiles.of(graph, None)
    assert "working directory" in astray(graph, unknown, "top")
    graph = graph._replace(cwd=str(folder))
    assert astray(graph, unknown, "top") == ""
    with path.open() as file:
        opened = OpenFiles.of(graph, ME, cwd=str(folder))
        known = identity.FileId.of(os.fstat(file.fileno()))
        path.rename(folder / "y")
        path.touch()
        assert "'x' is another file" in unnamed(graph, opened, "top", known)
        path.unlink()
        assert "no file has the name 'x'" in unnamed(graph, opened, "top", None)
        assert unnamed(graph, opened, "top", known) == ""  # under another name
        (folder / "y").rename(path)
        path.unlink()
        assert unnamed(graph, opened, "top", known)
        assert not opened.has_name(identity.FileId(1, 2))
        (disk,) = all_told_where(graph, ME, read_disks(graph))
        assert disk.chain[0].astray == disk.chain[0].warnings[-1]
