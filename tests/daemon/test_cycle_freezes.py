"""Golden cycles whose guests are quiesced for what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_cycles import ask, end_of
from tests.daemon.test_group_cycles import (
    DISCARD,
    KEEP,
    Ground,
    begin,
    died,
    end,
    ground,
    killed_daemon,
)
from tests.real.test_agent import FakeAgent, fake_agent


async def agents_of(at: Ground, stack: AsyncExitStack) -> dict[str, FakeAgent]:
    folder = at.folder
    return {name: await stack.enter_async_context(fake_agent(folder / name)) for name in at.vms}


def freezing(agents: dict[str, FakeAgent], freeze: str) -> dict[str, str]:
    """Members of the ``[[cycle]]``."""
    sockets = ", ".join(f'{name} = "{agent.path}"' for name, agent in agents.items())
    return {"freeze": f'"{freeze}"', "agents": f"{{{sockets}}}"}


@pytest.mark.parametrize("freeze", ["pause", "agent"])
@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=["one disk", "two VMs"])
async def test_what_is_kept_is_quiesced(folder: Path, shape: Sequence[int], freeze: str) -> None:
    async with ground(folder, shape) as at, killed_daemon(folder) as d, AsyncExitStack() as stack:
        agents = await agents_of(at, stack)
        d.config = at.config(KEEP, **freezing(agents, freeze))
        await d.start()
        await at.connected(d)
        vm, disk = list(at.chains)[-1]
        ended = await end_of(d, await ask(d, vm, disk))
        assert ended["state"] == "done", ended
        group: Any = (await d.get(f"/v1/groups/{ended['group']}")).json
        assert all(each["quiesced"] > 0 for each in group["outcome"]["outcomes"])
        many = 1 if freeze == "agent" else 0
        for agent in agents.values():
            assert agent.asked.count("guest-fsfreeze-freeze") == many
            assert not agent.frozen
        places = (folder / "places").read_text().splitlines()
        # A recycle stops the guest anyway, once.
        assert places.count("before stop") == len(at.vms)
        await at.ended_as(d, ended, keep=True)


async def test_a_discard_freezes_nobody(folder: Path) -> None:
    async with ground(folder, (1,)) as at, killed_daemon(folder) as d, AsyncExitStack() as stack:
        agents = await agents_of(at, stack)
        d.config = at.config(DISCARD, **freezing(agents, "agent"))
        await d.start()
        await at.connected(d)
        ended = await end(d, at)
        assert [agent.asked for agent in agents.values()] == [[]]
        await at.ended_as(d, ended, keep=False)


@pytest.mark.parametrize("place", ["after guest-fsfreeze-freeze", "before job-finalize"])
async def test_killed_while_frozen(folder: Path, place: str) -> None:
    async with (
        ground(folder, (1, 1)) as at,
        killed_daemon(folder) as d,
        AsyncExitStack() as stack,
    ):
        agents = await agents_of(at, stack)
        d.config = at.config(KEEP, **freezing(agents, "agent"))
        d.environment["QMPCOMMIT_DIE_IN"] = place
        await d.start()
        await at.connected(d)
        await begin(d, at)
        await died(d)
        assert any(agent.frozen for agent in agents.values())
        await d.start()
        await at.connected(d)
        ended = await end(d, at)
        assert not any(agent.frozen for agent in agents.values())
        await at.ended_as(d, ended, keep=True)
