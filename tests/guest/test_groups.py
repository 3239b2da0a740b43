"""Group commits of the daemon on real guests, frozen by real ``qemu-ga``s for the one instant."""

from __future__ import annotations

import asyncio
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_groups import end_of
from tests.guest.guest import SLOTS, Guest, assert_files, journal_is_empty, needs_guest
from tests.guest.test_windows import as_acknowledged, hosted, spun, status_of

pytestmark = [needs_guest, pytest.mark.timeout(900)]


def asked(guests: dict[str, Guest], action: str, freeze: str | None = "agent") -> dict[str, Any]:
    """A group over the guests' disks."""
    return {
        "members": [{"vm": name, "disk": "vda"} for name in guests],
        "policy": {"kind": action},
        "freeze": freeze,
        "agents": {name: made.agent for name, made in guests.items()},
    }


async def agents_answer(guests: dict[str, Guest]) -> None:
    for made in guests.values():
        made.order("agent")
        assert await status_of(made) == "thawed"


async def test_bases_are_what_the_agents_have_flushed(folder: Path) -> None:
    async with hosted(folder, "a", "b") as (d, guests):
        await agents_answer(guests)
        before = {name: as_acknowledged(made) for name, made in guests.items()}
        answer = await d.post("/v1/groups", asked(guests, "keep"))
        assert answer.status == 202, answer.body
        ended = await end_of(d, answer.json["id"])
        now = {name: as_acknowledged(made) for name, made in guests.items()}
        assert ended["state"] == "done", ended
        assert all(each["quiesced"] > 0 for each in ended["outcome"]["outcomes"])
        for name, made in guests.items():
            assert await status_of(made) == "thawed"
            await made.more()
            base = folder / name / "base.qcow2"
            assert journal_is_empty(base), "nobody has frozen it"
            kept, later = before[name], now[name].acked
            later.pop(now[name].count % SLOTS, None)  # which may have been written already
            kept.acked = {n: said for n, said in kept.acked.items() if later.get(n) == said}
            assert_files(Path(shutil.copy(base, base.with_name("kept.qcow2"))), kept)
        # The same without a freeze: what a power cut leaves, which the journal mends.
        answer = await d.post("/v1/groups", asked(guests, "keep", None))
        ended = await end_of(d, answer.json["id"])
        assert ended["state"] == "done", ended
        cut = [journal_is_empty(folder / name / "base.qcow2") for name in guests]
        assert not all(cut), "the test can't tell"
        for made in guests.values():
            await made.power_off()
    for name, made in guests.items():
        assert_files(folder / name / "top.qcow2", made)


@pytest.mark.parametrize("action", ["pivot", "recycle"])
@pytest.mark.parametrize("place", ["after guest-fsfreeze-freeze", "before job-finalize"])
async def test_a_daemon_that_is_killed_while_guests_are_frozen_thaws_them(
    folder: Path, place: str, action: str
) -> None:
    """With their disks held as well, to which a thaw writes."""
    async with hosted(folder, "a", "b") as (d, guests):
        await agents_answer(guests)
        await d.kill()
        d.environment["QMPCOMMIT_DIE_IN"] = place
        await d.start()
        for name in guests:
            await d.connected(name)
        body = asked(guests, action)
        fresh = {name: folder / name / "fresh.qcow2" for name in guests}
        if action == "recycle":
            del body["policy"]
            for member in body["members"]:
                overlay = str(fresh[member["vm"]])
                member["policy"] = {"kind": "recycle", "overlay": overlay}
        with suppress(OSError):
            await d.post("/v1/groups", body)
        assert d.process is not None
        assert await d.process.wait() == -signal.SIGKILL
        if action == "pivot":  # an agent in a guest that is paused says nothing
            frozen = [made for made in guests.values() if await status_of(made) == "frozen"]
            assert frozen
            assert [await spun(made) for made in frozen] == [0] * len(frozen)
        del d.environment["QMPCOMMIT_DIE_IN"]
        await d.start()
        (group,) = (await d.get("/v1/groups")).json
        for made in guests.values():
            async with asyncio.timeout(60):
                while await status_of(made) != "thawed":
                    await asyncio.sleep(0.05)
            await made.more()
        ended = await end_of(d, group["id"])
        assert (ended["state"], ended["outcome"]["warnings"]) == ("done", []), ended
        for made in guests.values():
            assert await status_of(made) == "thawed"
            await made.more()
            await made.power_off()
    for name, made in guests.items():
        assert_files(fresh[name] if action == "recycle" else folder / name / "base.qcow2", made)
