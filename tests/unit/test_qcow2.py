"""What a qcow2 file tells of itself, as qemu-img made it."""

from __future__ import annotations

from pathlib import Path

from qmpcommit.block.qcow2 import bitmap_names, holds_data
from tests.ground.images import MIB, Write, create, run, write
from tests.ground.qemu import QEMU


def test_data_is_seen(folder: Path) -> None:
    base = create(folder / "base.qcow2", 64 * MIB)
    top = create(folder / "top.qcow2", None, backing=base)
    assert not holds_data(str(top))
    write(top, [Write(63 * MIB, 512, 1)])
    assert holds_data(str(top))
    assert not holds_data(str(base))


def test_a_snapshot_counts_as_data(folder: Path) -> None:
    disk = create(folder / "disk.qcow2", MIB)
    run(QEMU.img, "snapshot", "-c", "one", disk)
    assert holds_data(str(disk))


def test_what_is_none_is_not_taken_for_empty(folder: Path) -> None:
    path = folder / "file"
    assert holds_data(str(path))
    path.write_bytes(b"")
    assert not holds_data(str(path))
    path.write_bytes(bytes(512))
    assert holds_data(str(path))
    path.write_bytes(b"QFI\xfb" + b"\xff" * 100)
    assert holds_data(str(path))
    assert bitmap_names(str(path)) == []


def test_bitmaps_are_named(folder: Path) -> None:
    disk = create(folder / "disk.qcow2", MIB)
    assert bitmap_names(str(disk)) == []
    names = ["a", "eight888", "a-rather-long-name-of-a-bitmap"]
    for name in names:
        run(QEMU.img, "bitmap", "--add", disk, name)
    assert sorted(bitmap_names(str(disk))) == sorted(names)
    old = folder / "old.qcow2"
    run(QEMU.img, "create", "-q", "-f", "qcow2", "-o", "compat=0.10", old, "1M")
    assert bitmap_names(str(old)) == []
    assert bitmap_names(str(folder / "none")) == []
