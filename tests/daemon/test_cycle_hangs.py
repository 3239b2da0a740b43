"""A round whose QEMU hangs in the middle of an exchange, or in which we fail ourselves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.daemons import Daemon
from tests.daemon.test_cycles import end_of
from tests.daemon.test_group_cycles import DISCARD, begin, end, ground, killed_daemon
from tests.ground.images import assert_disk
from tests.ground.sessions import runs


async def logged(d: Daemon, event: str) -> None:
    """Wait until the daemon has logged this."""
    async with asyncio.timeout(60):
        while f'"event": "{event}"' not in d.log:
            await asyncio.sleep(0.02)


async def running(d: Daemon) -> Any:
    (shown,) = (await d.get("/v1/cycles")).json
    return shown["running"]


@pytest.mark.parametrize("command", ["stop", "blockdev-snapshot", "blockdev-reopen", "cont"])
@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=["one VM", "two VMs"])
async def test_a_qemu_that_hangs_is_waited_for(
    folder: Path, shape: Sequence[int], command: str
) -> None:
    """Longer than one that is gone, for its guest may be paused."""
    async with ground(folder, shape) as at, killed_daemon(folder) as d:
        name = list(at.vms)[-1]
        qemu = at.vms[name]
        d.config = f'{at.config(DISCARD)}[limits]\ngone_after = "100ms"\n'
        d.environment["QMPCOMMIT_PATIENCE"] = "0.5"
        d.environment["QMPCOMMIT_HANGS"] = f"{name} {command} {qemu.pid}"
        await d.start()
        await at.connected(d)
        await begin(d, at)
        await logged(d, "exchange_hangs")
        await logged(d, "vm_away")  # it is not greeted any more, and gone_after is over
        found = await running(d)
        assert found["state"] == "discarding"
        assert found["error"] is None
        qemu.cont()
        ended = await end_of(d, found["id"])
        if ended["state"] == "failed":  # it was put back, and its time is over
            assert "nothing was discarded, and the guests go on" in ended["error"]["message"]
            await at.as_before(d)
        else:
            await at.ended_as(d, ended, keep=False)


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=["one VM", "two VMs"])
async def test_an_error_of_ours_leaves_no_guest_paused(folder: Path, shape: Sequence[int]) -> None:
    async with ground(folder, shape) as at, killed_daemon(folder) as d:
        d.config = at.config(DISCARD)
        d.environment["QMPCOMMIT_BUG"] = f"{list(at.vms)[-1]} blockdev-snapshot"
        await d.start()
        await at.connected(d)
        ended = await end(d, at)
        assert ended["state"] == "failed", ended
        assert "internal error" in ended["error"]["message"]
        assert "Nothing was discarded, and the guests go on" in ended["error"]["message"]
        await at.as_before(d)


async def test_a_guest_that_may_be_paused_after_an_error_of_ours_is_named(folder: Path) -> None:
    async with ground(folder, (1,)) as at, killed_daemon(folder) as d:
        (name,) = at.vms
        d.config = at.config(DISCARD)
        d.environment["QMPCOMMIT_BUG"] = f"{name} cont"
        await d.start()
        await at.connected(d)
        ended = await end(d, at)
        assert ended["state"] == "failed", ended
        message = ended["error"]["message"]
        assert f"The guest of {name} may be paused still" in message
        chain = at.chains[name, "vda"]
        assert f"{chain.top} is whole" in message
        assert not await runs(at.vms[name])
        (fresh, base), *_ = await at.layers(d)
        assert base == chain.base
        await d.kill()
        await at.vms[name].quit()
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(chain.base, chain.pictures[0])
    assert_disk(fresh, chain.pictures[0])
