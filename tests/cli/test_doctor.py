"""``qmpcommit doctor``: what is wrong with VMs, and what to type."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.qmp.monitor import Monitor
from qmpcommit.qmp.schema import VersionInfo, VersionTriple
from qmpcommit.recovery.findings import Finding
from qmpcommit.recovery.monitors import Place
from qmpcommit.recovery.seen import Seen
from qmpcommit.recovery.verdict import _of_death, examine
from tests.cli.command import on_a_terminal, qmpcommit, run
from tests.cli.test_recover import killed_at, tried
from tests.cli.test_vms import PATIENT, silent
from tests.ground.images import MIB, assert_disk, create, make_chain
from tests.ground.machines import machine, storage_daemon
from tests.ground.qemu import QEMU
from tests.ground.small_disk import needs_mounts, small_disk

__all__ = ["silent", "tried"]


async def symptoms(qmp: str) -> list[Any]:
    """What the command says of one VM, and its status is right."""
    said = await run("doctor", qmp, *PATIENT, "--json")
    (vm,) = said.json["vms"]
    wrong = [each for each in vm["symptoms"] if each["level"] == "wrong"]
    assert (said.status, said.json["wrong"], vm["well"]) == (
        (1, 1, False) if wrong else (0, 0, True)
    )
    return list(vm["symptoms"])


async def test_a_sound_vm_is_well_and_nothing_but_questions_is_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine(folder, make_chain(folder, 3), running=True) as qemu:
        said = await run("doctor", qemu.qmp, *PATIENT)
        assert (said.status, said.out) == (0, f"{qemu.qmp}: all is well\n")
        assert await symptoms(qemu.qmp) == []
        sent = []
        execute = Monitor.execute

        async def noted(self: Monitor, command: str, *given: Any, **more: Any) -> Any:
            sent.append(command)
            return await execute(self, command, *given, **more)

        monkeypatch.setattr(Monitor, "execute", noted)
        (found,) = await examine([Place((qemu.qmp,))], within=30)
        assert found.well
        assert sent
        assert [each for each in sent if "query-" not in each and each != "qom-list"] == []
        await qemu.quit()


@pytest.mark.parametrize(
    ("work", "step", "kinds"),
    [
        ("pivot", "before job-complete", {"ready", "claim"}),
        ("recycle", "before blockdev-snapshot", {"recycle", "frozen", "concluded", "claim"}),
    ],
)
async def test_what_a_killed_commit_has_left_goes_by_what_is_typed(
    tried: Path, work: str, step: str, kinds: set[str]
) -> None:
    async with machine(tried, make_chain(tried), running=True) as qemu:
        await killed_at(step, work, qemu, tried)
        found = await symptoms(qemu.qmp)
        assert kinds >= {each["kind"] for each in found} >= kinds - {"claim"}
        shown = await on_a_terminal("doctor", qemu.qmp, *PATIENT, columns=60)
        lines = shown.out.replace("\r", "").splitlines()
        assert shown.status == 1
        assert lines[0].startswith(qemu.qmp)
        assert all(f"    {each['command']}" in lines for each in found if each["command"])
        typed = shlex.split(next(each["command"] for each in found if each["command"]))
        words = ["keep" if word == "DECISION" else word for word in typed[1:]]
        done = await run(*words, "--yes")
        assert done.status == 0, done.out
        assert {each["kind"] for each in await symptoms(qemu.qmp)} <= {"overlay"}
        await qemu.quit()


async def test_a_busy_monitor_is_wrong(folder: Path, silent: str) -> None:
    async with machine(folder, make_chain(folder)) as qemu:
        said = await run("doctor", silent, qemu.qmp, "--timeout", "10", "--json")
        busy, well = said.json["vms"]
        assert (said.status, busy["well"], well["well"]) == (1, False, True)
        (symptom,) = busy["symptoms"]
        assert symptom["kind"] == "monitor"
        assert "another client holds this monitor" in symptom["message"]
        gone = await run("doctor", folder / "nowhere", qemu.qmp, *PATIENT)
        assert gone.status == 1
        assert f"{folder}/nowhere: 1 thing is wrong\n" in gone.out
        await qemu.quit()


def test_where_there_is_no_vm_it_is_4(folder: Path) -> None:
    said = qmpcommit("doctor", folder / "nowhere", "--json")
    assert said.status == 4
    assert "no such socket" in said.json["vms"][0]["symptoms"][0]["message"]


async def test_a_name_on_disk_that_leads_elsewhere(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        other = folder / "other.qcow2"
        create(other, 64 * MIB)
        rebased = create(folder / "rebased.qcow2", 64 * MIB, backing=other)
        with chain.top.open("r+b") as file:  # qemu-img rebase would want the lock that QEMU has
            file.write(rebased.read_bytes()[:65536])
        (symptom,) = await symptoms(qemu.qmp)
        assert (symptom["kind"], symptom["disk"]) == ("header", "vda")
        assert symptom["next"] == "Mend it while the VM is off"
        assert shlex.split(symptom["command"])[:3] == ["qemu-img", "rebase", "-u"]
        assert symptom["command"].endswith(f"-b {chain.base} {chain.top}")
        await qemu.quit()


async def test_a_base_that_another_vm_uses_is_a_note(folder: Path) -> None:
    chain = make_chain(folder)
    (folder / "b").mkdir()
    other = make_chain(folder / "b")
    other.top.unlink()
    create(other.top, 64 * MIB, backing=chain.base)
    async with (
        machine(folder, chain, style="implicit") as one,
        machine(folder / "b", other, style="implicit") as two,
    ):
        for qemu, pid in ((one, two.pid), (two, one.pid)):
            (symptom,) = await symptoms(qemu.qmp)
            assert (symptom["kind"], symptom["level"]) == ("base-shared", "note")
            assert str(pid) in symptom["message"]
        shown = await run("doctor", one.qmp, *PATIENT)
        assert shown.out.startswith(f"{one.qmp}: all is well\n  Note: vda: {chain.base} is locked")
        await one.quit()
        await two.quit()


async def test_how_a_vm_was_started_and_where_its_bitmaps_are_is_a_note(folder: Path) -> None:
    chain = make_chain(folder)
    node = f"driver=qcow2,node-name=b,file.driver=file,file.filename={chain.base}"
    top = f"driver=qcow2,node-name=t,backing=b,file.driver=file,file.filename={chain.top}"
    assert QEMU.system
    command = [QEMU.system, "-S", "-display", "none", "-nodefaults", "-machine", "q35,accel=tcg",
               "-no-reboot", "-qmp", f"unix:{folder}/one,server=on,wait=off",
               "-blockdev", node, "-blockdev", top,
               "-device", "virtio-blk-pci,drive=t,id=vda"]  # fmt: skip
    process = await asyncio.create_subprocess_exec(*command)
    try:
        while not (folder / "one").exists():
            await asyncio.sleep(0.01)
        async with qc.Session.connect(folder / "one") as vm:
            for name, nodes in (("low", "b"), ("both", "bt")):
                for each in nodes:
                    await vm.execute("block-dirty-bitmap-add", {"node": each, "name": name})
        found = {each["kind"]: each for each in await symptoms(str(folder / "one"))}
        assert found.keys() == {"bitmap", "no-reboot", "monitor"}
        assert {each["level"] for each in found.values()} == {"note"}
        assert (
            f"bitmap low is on {chain.base}, and not on {chain.top}" in found["bitmap"]["message"]
        )
    finally:
        process.kill()
        await process.wait()


async def test_what_a_fresh_overlay_may_have_lost_is_a_note(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh.qcow2"
    async with machine(folder, chain, running=True) as qemu:
        done = await run("commit", qemu.qmp, "vda", "--recycle", fresh, "--quiet")
        assert done.status == 0, done.err
        (found,) = await symptoms(qemu.qmp)
        assert (found["kind"], found["level"]) == ("overlay", "note")
        assert f"{fresh} was laid while the VM ran" in found["message"]
        await qemu.quit()
    assert_disk(fresh, chain.pictures[-1])


@needs_mounts
async def test_where_a_full_commit_has_no_room(folder: Path) -> None:
    with small_disk(folder / "small", 13 * MIB) as small:
        async with machine(folder, make_chain(small)) as qemu:
            (symptom,) = await symptoms(qemu.qmp)
            assert (symptom["kind"], symptom["level"]) == ("free-space", "wrong")
            dry = await run(*shlex.split(symptom["command"])[1:])
            assert "[refuse] free-space: " in dry.out
            await qemu.quit()


async def test_a_trap_of_this_version_that_concerns_the_vm_is_a_note(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with storage_daemon(folder, make_chain(folder)) as daemon:
        for major, kinds in ((7, ["trap"]), (10, [])):

            async def told(vm: Any, major: int = major) -> VersionInfo:
                version = VersionTriple(major=major, minor=0, micro=0)
                return VersionInfo(qemu=version, package="")

            monkeypatch.setattr(Monitor, "query_version", told)
            (found,) = await examine([Place((daemon.qmp,))], within=30)
            assert [each.kind for each in found.symptoms] == kinds
            assert found.well
        await daemon.quit()


@pytest.mark.parametrize(("how", "more"), [("frozen", " --agent SOCKET"), ("paused", "")])
def test_what_was_frozen_through_an_agent_needs_its_socket(how: str, more: str) -> None:
    graph: Any = None
    seen = Seen("a", "/a.sock", None, {}, graph)
    finding = Finding("frozen", "a", f"qmpcommit-w0a0b0c0d-{how}", "It stands still", "It goes on")
    assert _of_death(finding, seen, [seen]).command == f"qmpcommit recover /a.sock{more}"


def test_a_group_is_put_right_on_all_its_vms() -> None:
    graph: Any = None
    a, b, c = (
        Seen(name, f"/{name}.sock", None, {job: {}}, graph)
        for name, job in (
            ("a", "qmpcommit-vda-0123abcd.1of2"),
            ("b", "qmpcommit-vdb-0123abcd.2of2"),
            ("c", "qmpcommit-vda-76543210.1of2"),
        )
    )
    for seen, job, words in (
        (a, "qmpcommit-vda-0123abcd.1of2", "/a.sock /b.sock"),
        (c, "qmpcommit-vda-76543210.1of2", "/c.sock"),
    ):
        finding = Finding("pending", seen.vm, job, "it is held", "It is cancelled")
        said = _of_death(finding, seen, [a, b, c])
        assert said.command == f"qmpcommit recover {words}"


async def test_what_is_named_is_what_is_asked(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu:
        said = qmpcommit("doctor", *PATIENT, QMPCOMMIT_QMP=qemu.qmp)
        assert (said.status, said.out) == (0, f"{qemu.qmp}: all is well\n")
        await qemu.quit()
    assert qmpcommit("doctor").status == 2
    assert qmpcommit("doctor", "/x", "--all").status == 2
