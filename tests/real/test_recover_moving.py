"""A job that its process has left goes on by itself while `recover` looks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.recovery.doing import Recovery
from tests.ground.images import MIB, assert_disk, make_chain
from tests.ground.machines import machine


async def test_one_that_gets_ready_between_two_looks_is_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(folder, bulk=20 * MIB)
    look, kinds = Recovery._look, []

    async def looks(self: Recovery) -> list[qc.Finding]:
        found = await look(self)
        kinds.append([each.kind for each in found])
        if len(kinds) == 1:
            await qemu.execute("block-job-set-speed", device=job, speed=0)
            async with asyncio.timeout(20):
                while (await qemu.execute("query-jobs"))[0]["status"] != "ready":
                    await asyncio.sleep(0.005)  # its events go to those who listen meanwhile
        return found

    monkeypatch.setattr(Recovery, "_look", looks)
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = (await vm.commit("vda", policy=qc.Hold(), bandwidth="1MiB")).id
            await vm.release()  # as if killed
        async with qc.Session.connect(qemu.qmp) as vm:
            recovered = await vm.recover(decide="pivot")
            assert [(each.kind, each.done) for each in recovered.findings] == [("ready", True)]
        assert kinds[0] == ["copying"]
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
