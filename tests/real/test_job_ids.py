"""A job id that somebody else's job has: that job is never taken for ours."""

from __future__ import annotations

from pathlib import Path

import pytest

import qmpcommit as qc
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import machine
from tests.ground.proxy import proxy


@pytest.mark.parametrize("concluded", [False, True])
async def test_a_job_of_others_is_not_decided_because_a_reply_was_lost(
    concluded: bool, folder: Path
) -> None:
    ours, theirs = make_chain(folder), make_chain(folder, names=("b", "", "", "t"))
    async with (
        machine(folder, ours, theirs) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(qemu.qmp2) as other,
    ):
        with other.events("BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED") as heard:
            job = {"job-id": "backup", "device": "t", "auto-dismiss": False}
            await other.execute("block-commit", job)
            await anext(heard)
            if concluded:
                await other.execute("block-job-cancel", {"device": "backup", "force": False})
                await anext(heard)
        between.to_qemu = lambda message: (
            "cut after" if message.get("execute") == "block-commit" else "pass"
        )
        async with qc.Session.connect(between.path) as vm:
            with pytest.raises(qc.JobConflict, match="'backup'"):
                await (await vm.commit("vda", policy=qc.Pivot(), job_id="backup")).wait()
        assert "block-commit" not in between.sent
        (left,) = await other.query_jobs()
        assert (left.id, left.status) == ("backup", "concluded" if concluded else "ready")
        await other.execute("job-dismiss" if concluded else "job-cancel", {"id": "backup"})
        await other.close()
        await qemu.quit()
    for chain in (ours, theirs):
        assert_disk(chain.top, chain.pictures[-1])
