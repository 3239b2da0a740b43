"""A block device of one's own."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ground.images import run


@contextlib.contextmanager
def loop_device(path: Path, *options: str) -> Iterator[Path]:
    """A block device over a file."""
    done = subprocess.run(
        ["losetup", *options, "--show", "-f", path], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no loop device can be made: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        run("losetup", "-d", device)
