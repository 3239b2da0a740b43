"""``qmpcommit top``, driven as a person would, on real QEMUs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

import qmpcommit as qc
from qmpcommit.cli.live import Asked, Live, Question, plot
from qmpcommit.cli.sources import Daemon, Monitors
from tests.cli.command import on_a_terminal, run
from tests.cli.test_commit import BULK, SLOW, assert_kept, assert_pivoted, no_jobs
from tests.daemon.daemons import host_of
from tests.ground.images import make_chain
from tests.ground.machines import machine


async def until(pilot: Pilot[Any], there: Callable[[], bool]) -> None:
    """Let the screen go on until something is there."""
    async with asyncio.timeout(40):
        while not there():
            await pilot.pause(0.02)


def shown(app: Live, row: int = 0) -> list[str]:
    """The cells of a row, as they are read."""
    if row >= app.table.row_count:
        return [""] * 10
    return [str(cell) for cell in app.table.get_row_at(row)]


async def test_a_job_is_made_fast_and_pivoted(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain, extra=["-name", "web1"]) as qemu:
        begun = await run("commit", qemu.qmp, "vda", "--detach", "--json", *SLOW)
        assert begun.status == 0, begun.err
        source = Monitors([qemu.qmp], lambda: 30.0)
        source.every = 0.3
        app = Live(source)
        async with app.run_test(size=(120, 30)) as pilot:
            await until(pilot, lambda: shown(app)[4] == "copying")
            row = shown(app)
            assert row[:4] == ["web1", "vda", "2", "commit"]
            assert float(row[6]) < 100
            await pilot.press("s")
            await until(pilot, lambda: isinstance(app.screen, Asked))
            await pilot.press("m", "a", "x", "enter")
            await until(pilot, lambda: shown(app)[4] == "READY")
            await until(pilot, lambda: shown(app)[9] != "")
            assert shown(app)[5] == "█" * 16
            await pilot.press("p")
            await until(pilot, lambda: isinstance(app.screen, Question))
            assert f"{chain.top} is stale then: never boot it again" in app.screen.text  # type: ignore[attr-defined]
            await pilot.press("n")
            await until(pilot, lambda: not isinstance(app.screen, Question))
            await pilot.press("p")
            await until(pilot, lambda: isinstance(app.screen, Question))
            await pilot.press("y")
            await until(pilot, lambda: shown(app)[3] == "-")
            await pilot.press("q")
        await no_jobs(qemu)
        await qemu.quit()
    assert_pivoted(chain)


@pytest.mark.parametrize("by", ["monitor", "daemon"])
async def test_what_should_be_known_of_an_end_is_told(by: str, folder: Path) -> None:
    """An abort leaves a base that is valid only under the overlay."""
    chain = make_chain(folder)
    async with host_of(folder, chain) as (d, qemu):
        async with qc.Client(d.socket) as host:
            job = await host.vm("web1").commit("top", policy=qc.Hold())
            await job.ready()
        theirs = await qemu.execute("query-jobs")
        assert theirs
        source = Monitors([qemu.qmp2], lambda: 30.0)
        if by == "daemon":
            source = Daemon([], lambda: qc.Client(d.socket))  # type: ignore[assignment]
        app = Live(source)
        said: list[tuple[str, Any]] = []
        app.notify = lambda text, **how: said.append((text, how["severity"]))  # type: ignore[method-assign]
        async with app.run_test(size=(120, 30)) as pilot:
            await until(pilot, lambda: shown(app)[4] == "READY")
            await pilot.press("a")
            await until(pilot, lambda: isinstance(app.screen, Question))
            await pilot.press("y")
            await until(pilot, lambda: bool(said))
    ((text, severity),) = said
    assert text.partition("\n")[0].endswith("has ended by 'abort'")
    assert "Warning: " in text
    assert f"valid only under {chain.top}" in text
    assert severity == "warning"


async def test_a_daemons_commit_is_kept(folder: Path) -> None:
    chain = make_chain(folder)
    async with host_of(folder, chain) as (d, _):
        socket = str(d.socket)
        async with qc.Client(socket) as host:
            await host.vm("web1").commit("top", policy=qc.Hold())
        source = Daemon(["web*"], lambda: qc.Client(socket))
        source.every = 0.3
        app = Live(source)
        async with app.run_test(size=(120, 30)) as pilot:
            await until(pilot, lambda: shown(app)[4] == "READY")
            await until(pilot, lambda: shown(app)[9] != "")
            assert shown(app)[:4] == ["web1", "top", "2", "commit"]
            await pilot.press("k")
            await until(pilot, lambda: isinstance(app.screen, Question))
            await pilot.press("y")
            await until(pilot, lambda: shown(app)[3] == "-")
        listed = await run(f"--daemon={socket}", "vms", "web*", "--format", "vm,disks,jobs")
        assert [line.split() for line in listed.out.splitlines()] == [
            ["VM", "DISKS", "JOBS"],
            ["web1", "top", "-"],
        ]
    assert_kept(chain)


async def test_what_it_fails_of_is_said_and_it_looks_again() -> None:
    source = Monitors([], lambda: 30.0)
    source.every = 0.01
    failures: list[Exception] = [OSError(13, "Permission denied", "/proc"), qc.VMGone("it ended")]

    async def look() -> list[Any]:
        if failures:
            raise failures.pop(0)
        return []

    source.look = look  # type: ignore[method-assign]
    said: list[str] = []
    app = Live(source)
    app.say = said.append  # type: ignore[assignment, method-assign]
    async with app.run_test() as pilot:
        await until(pilot, lambda: any("no VM was found" in text for text in said))
    assert said[:2] == ["/proc: Permission denied", "it ended"]


def test_what_is_left_is_plotted_from_nothing() -> None:
    assert plot([4, 2, 1, 0], 10, 2) == ["█", "██▄"]
    assert plot([0, 0], 10, 2) == ["", ""]
    assert plot(list(range(100, 0, -1)), 10, 1) == ["█▇▆▅▄▄▃▂▁▁"]


async def test_what_it_needs_is_said(folder: Path) -> None:
    (folder / "textual.py").write_text("raise ImportError\n")
    said = await on_a_terminal("top", PYTHONPATH=f"{folder}:{Path(qc.__file__).parent.parent}")
    assert said.status == 2
    assert "pip install 'qmpcommit[top]'" in said.out
    piped = await run("top")
    assert piped.status == 2
    assert "top needs a terminal" in piped.err
