"""A file system with little room."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount."""
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as name:
        tried = _mount(Path(name), 4096)
        if tried:
            _unmount(Path(name))
        return tried


def _mount(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)


needs_mounts = pytest.mark.skipif(
    not can_mount(), reason="a disk of its own needs root, and the right to mount"
)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of that many bytes, mounted on a new folder."""
    folder.mkdir()
    assert _mount(folder, size)
    try:
        yield folder
    finally:
        _unmount(folder)


def fill(path: Path) -> None:
    """Write a file until its disk is full; unlink it to make room again."""
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return
