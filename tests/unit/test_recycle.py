"""Creations of overlays that take their time, for which a real QEMU's are too short."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpcommit.commit import recycle
from qmpcommit.commit.driver import Resumed
from qmpcommit.commit.overlay import creation_job
from qmpcommit.commit.overlay.fresh import FreshOverlay
from qmpcommit.commit.phases import State, Verdict
from qmpcommit.commit.policy import Recycle
from qmpcommit.commit.recycle import Left, has_ended
from qmpcommit.errors import CommandRefused, CommitFailed
from qmpcommit.qmp.monitor import Monitor
from tests.unit.test_checks import made

JOB = "qmpcommit-j"


class Creating(Monitor):
    """Its jobs end at the query after `looks`; that is an event too if it `tells`."""

    connected = True

    def __init__(self, looks: float, *, tells: bool = False, timeout: float = 10.0) -> None:
        super().__init__("/nowhere", command_timeout=timeout)
        self.looks, self.tells = looks, tells
        self.jobs: dict[str, int] = {}
        self.dismissed: list[str] = []
        self.sent: list[str] = []

    async def execute(self, command: str, arguments: Any = None, **more: object) -> Any:
        await asyncio.sleep(0)
        self.sent.append(command)
        if command == "blockdev-create":
            self.begin(arguments["job-id"])
        elif command == "job-dismiss":
            job = arguments["id"]
            assert self.jobs.pop(job) >= self.looks + (not self.tells), f"{job} runs still"
            self.dismissed.append(job)
        elif command == "blockdev-add" and (arguments or {}).get("read-only"):
            desc = "Could not open 'fresh': No such file or directory"
            if os.path.isdir(arguments["filename"]):
                desc = "'file' driver requires the folder to be a regular file"
            raise CommandRefused("none", error_class="GenericError", desc=desc)
        elif command in ("query-status", "x-debug-query-block-graph"):
            raise CommandRefused("no guest", error_class="CommandNotFound", desc="not found")
        elif command == "query-jobs":
            return [self._look(job) for job in list(self.jobs)]
        elif command == "query-named-block-nodes":
            base = {"node-name": "base", "drv": "raw", "file": "/vms/base"}
            empty = {"node-name": f"{JOB}-file", "drv": "file", "image": {"virtual-size": 0}}
            return [base, empty]
        return {}

    def begin(self, job: str) -> None:
        self.jobs[job] = 0

    def _look(self, job: str) -> dict[str, Any]:
        seen = self.jobs[job]
        self.jobs[job] += 1
        if self.tells and seen + 1 == self.looks:
            data = {"id": job, "status": "concluded"}
            self._dispatch({"event": "JOB_STATUS_CHANGE", "data": data})
        return {"id": job, "status": "concluded" if seen >= self.looks else "running"}


def overlay(vm: Monitor, folder: Path) -> FreshOverlay:
    _, plan = made(job_id=JOB)
    return FreshOverlay(vm, plan, str(folder / "fresh.qcow2"), None)


async def test_a_creation_is_asked_for_until_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creation_job, "PATIENCE", 0.001)
    vm = Creating(looks=3)
    await overlay(vm, tmp_path).open()
    assert vm.dismissed == [f"{JOB}-create-qcow2"]


@pytest.mark.parametrize("tells", [True, False])
async def test_a_creation_of_a_former_process_is_seen_to_its_end(
    tells: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creation_job, "PATIENCE", 1000.0 if tells else 0.001)
    vm = Creating(looks=1, tells=tells)
    vm.begin(f"{JOB}-create-file")
    fresh = overlay(vm, tmp_path)
    await fresh._forget()
    assert vm.dismissed == [f"{JOB}-create-file"]


async def test_a_key_whose_work_qemu_could_not_measure_is_made_again(tmp_path: Path) -> None:
    class Busy(Creating):
        def _look(self, job: str) -> dict[str, Any]:
            return {**super()._look(job), "error": "Unable to get accurate CPU usage"}

    vm = Busy(looks=0)
    with pytest.raises(CommitFailed, match="accurate CPU usage"):
        await overlay(vm, tmp_path).open()
    assert len(vm.dismissed) == creation_job.TRIES


async def test_a_creation_that_does_not_end_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creation_job, "PATIENCE", 0.001)
    vm = Creating(looks=math.inf, timeout=0.05)
    with pytest.raises(CommitFailed, match=r"did not create .*fresh.qcow2 within 0.05 s"):
        await overlay(vm, tmp_path).open()
    assert vm.dismissed == []


async def test_what_is_in_the_way_is_not_written_to_and_nothing_is_undone(tmp_path: Path) -> None:
    (tmp_path / "fresh.qcow2").write_bytes(b"precious")
    vm = Creating(looks=0)
    fresh = overlay(vm, tmp_path)
    with pytest.raises(CommitFailed, match="exists already"):
        await fresh.open()
    await fresh.undo()
    assert vm.sent == []
    assert (tmp_path / "fresh.qcow2").read_bytes() == b"precious"


async def test_where_no_guest_is_none_is_paused(tmp_path: Path) -> None:
    vm = Creating(looks=0)
    fresh = overlay(vm, tmp_path)
    await fresh.freeze()
    await fresh.thaw()
    assert vm.sent[-1] == "query-status"
    assert fresh.paused is None


def test_whether_a_process_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_ended(None)
    assert not has_ended(os.getpid())
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert has_ended(child.pid)  # and nobody has asked yet how
    assert has_ended(child.pid)

    def broken(*args: object) -> None:
        raise OSError

    monkeypatch.setattr(recycle, "open", broken, raising=False)
    assert not has_ended(os.getpid())  # it can't be told


def test_what_a_former_process_may_have_left_of_its_overlay() -> None:
    state, policy = State(two_phase=True), Recycle("fresh")
    assert Resumed(state).left is None
    assert Resumed(state, recycle=policy).left == Left("fresh", laid=False)
    for verdict in (Verdict.PIVOTED, Verdict.RECYCLED):
        over = state._replace(verdict=verdict)
        assert Resumed(over, recycle=policy).left == Left("fresh", laid=True)
