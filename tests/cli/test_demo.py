"""``qmpcommit demo``: what it proves, and what it leaves behind (nothing)."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.cli.command import ENVIRONMENT, end, qmpcommit, start
from tests.ground.images import read


def processes(folder: Path) -> list[str]:
    """The running programs whose command line names something in that folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


KINDS = pytest.mark.parametrize("words", [[], ["--storage-daemon"]], ids=["system", "daemon"])


@KINDS
def test_it_proves_and_leaves_nothing(words: list[str], folder: Path) -> None:
    said = qmpcommit("demo", *words, TMPDIR=str(folder))
    assert (said.status, said.err) == (0, "")
    assert said.out.splitlines()[-1].startswith("proved:")
    assert list(folder.iterdir()) == []
    assert processes(folder) == []


@KINDS
def test_its_json_and_its_files(words: list[str], folder: Path) -> None:
    said = qmpcommit("demo", *words, "--json", "--keep-files", TMPDIR=str(folder))
    assert (said.status, said.err) == (0, "")
    assert said.json["proved"] is True
    assert [outcome["action"] for outcome in said.json["outcomes"]] == ["pivot", "keep"]
    kept = Path(said.json["files"])
    assert kept.parent == folder
    base, overlay = (read(kept / "keep" / f"{name}.qcow2") for name in ("base", "overlay"))
    assert len(base) == len(overlay)
    assert base != overlay  # the writer went on after the keep
    assert processes(folder) == []


def test_quiet(folder: Path) -> None:
    said = qmpcommit("demo", "--quiet", TMPDIR=str(folder))
    assert (said.status, said.out, said.err) == (0, "", "")


@pytest.mark.parametrize("wait", [0.3, 0.5, 0.8])
async def test_interrupted_it_leaves_nothing(
    wait: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVIRONMENT, "TMPDIR", str(folder))
    process = await start("demo")
    assert process.stdout is not None
    await process.stdout.readline()
    await asyncio.sleep(wait / 4)
    process.send_signal(signal.SIGINT)
    said = await end(process)
    assert said.status == 130
    assert said.err.startswith("qmpcommit: interrupted")
    assert list(folder.iterdir()) == []
    assert processes(folder) == []


def test_a_wrong_byte_is_a_failure(folder: Path) -> None:
    """With a qemu-img that changes one byte of what it converts."""
    real = shutil.which("qemu-img")
    false = folder / "qemu-img"
    false.write_text(
        f'#!/bin/sh\n{real} "$@" || exit\n[ "$1" = convert ] || exit 0\n'
        'for last; do :; done\nprintf x | dd of="$last" bs=1 seek=123456 conv=notrunc 2>&1\n'
    )
    false.chmod(0o755)
    said = qmpcommit("demo", TMPDIR=str(folder), PATH=f"{folder}:{os.environ['PATH']}")
    assert said.status == 1
    assert "NOT proved" in said.err
    assert "proved:" not in said.out
    assert not [each for each in processes(folder) if "qemu-system" in each]


def test_without_qemu_it_says_what_to_install(folder: Path) -> None:
    said = qmpcommit("demo", PATH=str(folder))
    assert said.status == 1
    for word in ("apt install", "dnf install", "pacman -S", "brew install"):
        assert word in said.err
    said = qmpcommit("demo", "--json", PATH=str(folder))
    assert (said.status, said.error["type"]) == (1, "DemoFailed")
