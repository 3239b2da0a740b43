"""For how many syncs of the journal, one after the other, a commit over HTTP waits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.daemon.daemons import Daemon
from tests.ground.daemons import many_disks
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import storage_daemon

FOUR = ["promised", "job-complete", "job-dismiss", "ended"]
DELETING = [*FOUR[:3], "clear-away", FOUR[3]]
KEPT = ["promised", "block-job-cancel", "job-dismiss", "ended"]


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        ({"policy": {"kind": "pivot"}}, FOUR),
        ({"policy": {"kind": "keep"}}, KEPT),
        ({"policy": {"kind": "pivot"}, "delete": True}, DELETING),
    ],
    ids=["pivot", "keep", "pivot-and-delete"],
)
async def test_a_commit_waits_for_four(folder: Path, asked: Any, waits: list[str]) -> None:
    """That it is begun is durable with what promises it, and what is closed is closed again."""
    chain, told = make_chain(folder), folder / "waited"
    d = Daemon(folder, "", {"QMPCOMMIT_WAITED": str(told)}, module="tests.daemon.waited")
    async with storage_daemon(folder, chain) as qemu:
        await d.start()
        await d.post("/v1/vms", {"name": "web1", "qmp": qemu.qmp})
        await d.connected("web1")
        told.write_text("")
        ended = await d.end_of(await d.commit("web1", disk="top", **asked))
        assert told.read_text().split("\n")[:-1] == waits
        assert await d.stop() == 0
        await qemu.quit()
    kept = ended["outcome"]["action"] == "keep"
    assert_disk(chain.top if kept else chain.base, chain.pictures[-1])


async def test_one_that_waits_in_the_queue_is_begun_when_that_is_durable(folder: Path) -> None:
    chains = make_chain(folder), make_chain(folder, names=("base2", "mid2", "low2", "top2"))
    told = folder / "waited"
    limits = "[limits]\ncommits = 1\n"
    d = Daemon(folder, limits, {"QMPCOMMIT_WAITED": str(told)}, module="tests.daemon.waited")
    async with many_disks(folder / "qemu", *chains, exports=False) as qemu:
        await d.start()
        await d.post("/v1/vms", {"name": "web1", "qmp": qemu.qmp})
        await d.connected("web1")
        first = await d.commit("web1", disk="top", policy={"kind": "hold"})
        await d.until(first, "ready")
        queued = await d.commit("web1", disk="top2", policy={"kind": "keep"})
        told.write_text("")
        await d.post(f"/v1/commits/{first}/decision", {"action": "keep"})
        assert (await d.end_of(queued))["outcome"]["action"] == "keep"
        noted = told.read_text().split("\n")
        assert noted.index("UPDATE commits SET plan = ?, s block-commit") > noted.index("ended")
        assert await d.stop() == 0
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])
