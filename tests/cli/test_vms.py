"""``qmpcommit vms``: the VMs of a host, each asked in bounded time."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpcommit.block.command_line import parse_command_line
from qmpcommit.cli.options import Options
from qmpcommit.cli.running import Run
from qmpcommit.cli.vms import _vms
from qmpcommit.qmp import bound
from qmpcommit.recovery import monitors
from qmpcommit.recovery.host import states
from qmpcommit.recovery.monitors import Place, Served
from tests.cli.command import on_a_terminal, qmpcommit, run
from tests.ground.images import make_chain
from tests.ground.images import run as run_tool
from tests.ground.machines import machine, storage_daemon
from tests.ground.qemu import QEMU

PATIENT = ("--timeout", "30")
"""What a busy machine needs that no test fails of it."""


@pytest.fixture
def silent(folder: Path) -> Iterator[str]:
    """A socket that accepts and never greets, as a monitor does that somebody else has."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "silent.sock"))
        server.listen(8)
        yield str(folder / "silent.sock")


async def test_a_vm_is_one_row_however_many_monitors_it_has(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain, extra=["-name", "web1"]) as qemu:
        said = await run("vms", folder / "qmp*", *PATIENT, "--json")
        assert said.status == 0, said.err
        (vm,) = said.json["vms"]
        assert (vm["address"], vm["others"]) == (qemu.qmp, [qemu.qmp2])
        assert (vm["name"], vm["status"], vm["asked"]) == ("web1", "prelaunch", True)
        assert vm["wrong"] == vm["jobs"] == vm["windows"] == vm["frozen"] == []
        (disk,) = vm["disks"]
        assert (disk["name"], disk["depth"], disk["overlay"]) == ("vda", 3, str(chain.top))
        version = await qemu.execute("query-version")
        assert vm["qemu"].startswith(f"{version['qemu']['major']}.{version['qemu']['minor']}.")
        shown = await run("vms", qemu.qmp2, *PATIENT)
        heads, row = shown.out.splitlines()
        assert heads.split()[0] == "VM"
        assert row.split()[0] == "web1"
        assert row.split()[-1] == qemu.qmp2
        narrow = await on_a_terminal("vms", qemu.qmp2, *PATIENT, columns=60)
        assert f"    {qemu.qmp2}" in narrow.out.replace("\r", "").splitlines()
        assert narrow.out.split() == shown.out.split()
        await qemu.quit()


async def test_what_a_killed_client_has_left_is_told(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu:
        left = await run("commit", qemu.qmp, "vda", "--detach", "--json")
        assert left.status == 0, left.err
        said = await run("vms", qemu.qmp, *PATIENT, "--json")
        (vm,) = said.json["vms"]
        (job,) = vm["jobs"]
        assert (job["type"], job["status"], job["disk"]) == ("commit", "ready", "vda")
        assert job["current"] == job["total"] > 0
        assert any("is READY; it was detached, and waits" in each for each in vm["wrong"])
        shown = await run("vms", qemu.qmp, *PATIENT)
        assert f"    job {job['id']} on vda: commit, ready, " in shown.out
        assert "    WARNING: job " in shown.out
        await qemu.quit()


async def test_a_busy_monitor_is_a_row_with_why(folder: Path, silent: str) -> None:
    async with machine(folder, make_chain(folder)) as qemu:
        said = await run("vms", silent, qemu.qmp, "--json", "--timeout", "10")
        assert said.status == 0
        busy, well = said.json["vms"]
        assert (busy["address"], busy["asked"]) == (silent, False)
        assert "another client holds this monitor" in busy["wrong"][0]
        assert well["asked"]
        shown = await run("vms", silent)
        assert "not asked" in shown.out
        assert "    WARNING: " in shown.out
        await qemu.quit()


async def test_where_one_monitor_is_busy_the_other_is_asked(folder: Path, silent: str) -> None:
    async with machine(folder, make_chain(folder)) as qemu:
        (vm,) = await states([Place((silent, qemu.qmp))], within=10)
        assert (vm.asked, vm.address, vm.others) == (True, qemu.qmp, (silent,))
        await qemu.quit()


async def test_a_qemu_that_hangs_is_a_row_too(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu:
        qemu.stop()
        said = await run("vms", qemu.qmp, "--json")
        (vm,) = said.json["vms"]
        assert (said.status, vm["asked"]) == (0, False)
        qemu.cont()
        await qemu.quit()


def test_a_glob_that_names_nothing_is_4(folder: Path) -> None:
    (folder / "file.sock").touch()
    said = qmpcommit("vms", folder / "*.sock", "--json")
    assert (said.status, said.error["type"]) == (4, "VMNotFound")
    assert f"{folder}/*.sock" in said.error["message"]


async def test_where_there_is_no_vm_it_says_where_it_looked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitors, "SOCKETS", str(folder / "*.sock"))
    monkeypatch.setattr(monitors, "served", lambda: Served((), frozenset()))
    answer = await _vms(Run(Options.of(False, False, 0, None)), ())
    assert (answer.status, answer.data["vms"]) == (0, [])
    assert answer.text.startswith("no VM was found. Looked for sockets /run/vms/*/*.sock, and ")


async def test_processes_tell_where_their_monitors_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = folder / "agent.sock"
    serial = ["-chardev", f"socket,id=a,path={agent},server=on,wait=off"]
    (folder / "d").mkdir()
    async with (
        machine(folder, make_chain(folder), extra=serial) as qemu,
        storage_daemon(folder / "d", make_chain(folder / "d")) as daemon,
    ):
        known = monitors.served()
        assert (qemu.qmp, qemu.qmp2) in known.vms
        assert (daemon.qmp, daemon.qmp2) in known.vms
        assert str(agent) in known.others
        mine = [vm for vm in known.vms if vm[0] in (qemu.qmp, daemon.qmp)]
        monkeypatch.setattr(monitors, "served", lambda: Served(tuple(mine), known.others))
        monkeypatch.setattr(monitors, "SOCKETS", str(folder / "*.sock"))
        assert {place.addresses for place in monitors.find()} == set(mine)
        assert [place.addresses for place in monitors.find([str(agent)])] == [(str(agent),)]
        await daemon.quit()
        await qemu.quit()


@pytest.mark.parametrize("known", [True, False])
async def test_monitors_by_relative_names_are_found_or_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    """QEMU is in ``/`` then; where it was started its environment tells."""
    assert QEMU.system
    line = [QEMU.system, "-daemonize", "-pidfile", "pid", "-display", "none", "-nodefaults", "-S",
            "-machine", "none", "-qmp", "unix:qmp.sock,server=on,wait=off"]  # fmt: skip
    run_tool("sh", "-c", f'cd "$1"; shift; export PWD={folder if known else "/"}; exec "$@"', "sh",
             folder, *line)  # fmt: skip
    pid = int((folder / "pid").read_text())
    try:
        if not known:
            monkeypatch.setattr(bound, "_folders", lambda pid: [])
        served = monitors.served()
        mine = (str(folder / "qmp.sock"),)
        lost = [each for each in served.lost if str(pid) in each.why]
        assert (mine in served.vms, len(lost)) == (known, not known)
        for place in lost:
            (state,) = await states([place], within=10)
            assert (state.asked, state.address) == (False, f"qmp.sock (process {pid})")
            assert "-qmp unix:$PWD/qmp.sock" in state.wrong[0]
    finally:
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            while os.path.exists(f"/proc/{pid}"):
                await asyncio.sleep(0.01)  # it is no child of ours


def test_a_command_line_tells_monitors_from_other_sockets() -> None:
    line = parse_command_line(
        [
            *("qemu", "-qmp", "unix:/a,server,nowait", "-qmp", "unix:/client"),
            *("-chardev", "socket,id=m,path=/b,,c,server=on", "-mon", "chardev=m,mode=control"),
            *("-chardev", "socket,id=h,path=/hmp,server=on", "-mon", "chardev=h"),
            *("-chardev", "socket,id=g,path=/agent,server=on,wait=off"),
            *("-chardev", "socket,id=c,path=/far", "-chardev", "null,id=n"),
            *("-serial", "unix:/serial,server=on", "-monitor", "stdio"),
        ]
    )
    assert line.monitors == ("/a", "/b,c")
    assert set(line.sockets) == {"/hmp", "/agent", "/serial"}
