"""A commit job that others have begun becomes the daemon's own, and ends as its commits do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import run as qmpcommit
from tests.daemon.daemons import Daemon
from tests.daemon.kill_sweep import killable
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, machine
from tests.ground.places import STRIDE, first

JOB = "theirs"


class Host:
    """A VM with another program's commit job, and the daemon."""

    def __init__(self, d: Daemon, vm: Machine, chain: Chain) -> None:
        self.d, self.vm, self.chain = d, vm, chain

    async def begin(self, **more: Any) -> None:
        """Somebody begins a job, and a bitmap is there to be carried; READY when this returns."""
        await self.vm.execute("block-dirty-bitmap-add", node="top", name="b", persistent=True)
        await self.vm.execute("block-commit", job_id=JOB, device="top", **more)
        await self.until("ready")

    async def until(self, status: str) -> None:
        async with asyncio.timeout(20):
            while [each["status"] for each in await self.vm.execute("query-jobs")] != [status]:
                await asyncio.sleep(0.01)

    async def decide(self, action: str, **more: Any) -> Any:
        path = f"/v1/vms/web1/jobs/{JOB}/decision"
        return await self.d.post(path, {"action": action, **more}, Idempotency_Key="k")

    async def bitmaps(self, node: str) -> list[str]:
        """The names of a node's."""
        for each in await self.vm.execute("query-named-block-nodes"):
            if each["node-name"] == node:
                return [bitmap["name"] for bitmap in each.get("dirty-bitmaps", ())]
        return []

    async def pivoted(self) -> None:
        """The base is active, and nothing is left of what lay over it."""
        assert await self.vm.execute("query-jobs") == []
        (device,) = await self.vm.execute("query-block")
        assert device["inserted"]["file"] == str(self.chain.base)
        nodes = [each["node-name"] for each in await self.vm.execute("query-named-block-nodes")]
        assert "top" not in nodes
        assert await self.bitmaps("base") == ["b"]
        assert not self.chain.top.exists()


@asynccontextmanager
async def host(folder: Path, **more: Any) -> AsyncIterator[Host]:
    """All of it."""
    chain = make_chain(folder, 2)
    d = killable(folder)
    async with machine(folder, chain, running=True) as vm:
        d.config += f'{more.get("config", "")}[[vm]]\nname = "web1"\nqmp = "{vm.qmp}"\n'
        await d.start()
        try:
            await d.connected("web1")
            made = Host(d, vm, chain)
            if more.get("begins", True):
                await made.begin(**more.get("job", {}))
            yield made
        except BaseException:
            print(d.log[-6000:])
            raise
        finally:
            if d.process is not None:
                await d.kill()
        await vm.quit()
    assert_disk(chain.base, chain.pictures[-1])


@pytest.mark.parametrize("job", [{}, {"auto_finalize": False, "auto_dismiss": False}], ids=str)
async def test_a_foreign_job_is_pivoted_as_its_own(folder: Path, job: dict[str, Any]) -> None:
    async with host(folder, job=job) as at:
        hook = ["sh", "-c", f"echo $QMPCOMMIT_DISK > {folder}/hook"]
        answer = await at.decide("pivot", delete=True, on_pivot=hook)
        assert answer.status == 202, answer.body
        assert (await at.decide("pivot", delete=True, on_pivot=hook)).json["id"] == answer.json[
            "id"
        ]
        end = await at.d.end_of(answer.json["id"])
        assert end["outcome"]["action"] == "pivot", end
        assert end["outcome"]["deleted"] == [str(at.chain.top)]
        assert (end["job_id"], end["disk"], end["outcome"]["hook"]) == (JOB, "vda", "done")
        assert (folder / "hook").read_text() == "vda\n"
        await at.pivoted()


async def test_what_can_not_be_adopted_is_told_and_left(folder: Path) -> None:
    async with host(folder, begins=False) as at:
        answer = await at.decide("pivot")
        assert (answer.status, answer.json["error"]["type"]) == (404, "JobNotFound")
        await at.vm.execute("block-commit", job_id=JOB, device="top", speed=1)
        answer = await at.decide("pivot")
        ready = answer.status == 202  # little data is let through at once
        if not ready:
            assert (answer.status, answer.json["error"]["type"]) == (409, "NotReady")
            answer = await at.d.post(
                f"/v1/vms/web1/jobs/{JOB}/decision", {"action": "keep", "delete": True}
            )
            assert answer.status == 422
            assert (await at.d.get("/v1/commits")).json == []
            waits = await at.d.post(
                f"/v1/vms/web1/jobs/{JOB}/decision", {"action": "keep", "wait": True}
            )
            assert waits.status == 202, waits.body
            await at.vm.execute("block-job-set-speed", device=JOB, speed=0)
            answer = waits
        end = await at.d.end_of(answer.json["id"])
        assert end["outcome"]["status"] == "completed"


async def test_the_daemons_own_job_is_decided_as_what_it_is(folder: Path) -> None:
    async with host(folder, begins=False) as at:
        commit = await at.d.commit("web1", disk="vda", policy={"kind": "hold"}, job_id=JOB)
        await at.d.until(commit, "ready")
        answer = await at.decide("pivot")
        assert answer.status == 409
        assert f"/v1/commits/{commit}/decision" in answer.json["detail"]
        await at.d.post(f"/v1/commits/{commit}/decision", {"action": "keep"})
        assert (await at.d.end_of(commit))["outcome"]["action"] == "keep"


async def test_what_may_not_be_deleted_is_refused(folder: Path) -> None:
    access = f'[access]\ndeletions = ["{folder}/none"]\n'
    async with host(folder, config=access) as at:
        answer = await at.decide("pivot", delete=True)
        assert (answer.status, "access.deletions" in answer.json["detail"]) == (422, True)
        answer = await at.d.post(f"/v1/vms/web1/jobs/{JOB}/decision", {"action": "pivot"})
        assert (await at.d.end_of(answer.json["id"]))["outcome"]["deleted"] == []
    assert at.chain.top.exists()


@pytest.mark.parametrize("verb", ["pivot", "abort"])
async def test_the_command_adopts_it(folder: Path, verb: str) -> None:
    async with host(folder) as at:
        words = ["--daemon", at.d.socket, verb, "web1", JOB, "--json"]
        words += ["--delete"] if verb == "pivot" else []
        said = await qmpcommit(*words)
        assert said.status == 0, said.err
        assert said.json["action"] == verb
        if verb == "pivot":
            await at.pivoted()
        else:
            assert await at.bitmaps("top") == ["b"]
            (commit,) = (await at.d.get("/v1/commits")).json
            assert (commit["decision"], commit["state"]) == ("abort", "done")
    assert at.chain.top.exists() is (verb == "abort")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", [{}, {"auto_finalize": False, "auto_dismiss": False}], ids=str)
async def test_killed_anywhere_the_next_daemon_ends_it(folder: Path, job: dict[str, Any]) -> None:
    place, tried = first() - STRIDE, 0
    died = True
    while died:
        place += STRIDE
        at_place = folder / str(place)
        at_place.mkdir()
        async with host(at_place, job=job) as at:
            await at.d.kill()
            at.d.environment["QMPCOMMIT_DIE_AT"] = str(place)
            await at.d.start()
            await at.d.connected("web1")
            commit = None
            died = False
            try:
                answer = await at.decide("pivot", delete=True)
                assert answer.status == 202, answer.body
                commit = answer.json["id"]
                await at.d.end_of(commit, seconds=5)
            except (OSError, TimeoutError, qc.QmpCommitError):
                died = True
            assert at.d.process is not None
            if died:
                async with asyncio.timeout(20):
                    await at.d.process.wait()
                at.d.environment["QMPCOMMIT_DIE_AT"] = "0"
                await at.d.start()
                await at.d.connected("web1")
                known = (await at.d.get("/v1/commits")).json
                if not known:  # it had not been promised
                    answer = await at.decide("pivot", delete=True)
                    assert answer.status == 202, answer.body
                    known = [answer.json]
                commit = known[0]["id"]
                tried += 1
            assert commit is not None
            end = await at.d.end_of(commit)
            assert end["state"] == "done", (place, end)
            assert end["outcome"]["action"] == "pivot"
            await at.pivoted()
    print(f"killed at {tried} places")
    assert tried >= 8 // STRIDE
