"""What ended long ago is forgotten by a daemon that goes on running, and nothing that counts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.daemon.daemons import Daemon, daemon
from tests.daemon.test_cycles import ask, config_of, end_of
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import Machine, machine, storage_daemon

SHORT = "retain_days = 0.00002\n"  # 1.7 s

OTHERS = ("base2", "mid2", "low2", "top2")

HOLD = {"disk": "top", "policy": {"kind": "hold"}}


def vm_called(name: str, vm: Machine) -> str:
    """Its part of a configuration."""
    return f'[[vm]]\nname = "{name}"\nqmp = "{vm.qmp}"\n'


def sub(folder: Path, name: str) -> Path:
    """A folder for one QEMU."""
    made = folder / name
    made.mkdir()
    return made


async def gone(d: Daemon, commit: str) -> None:
    """Wait until a commit is not known any more."""
    async with asyncio.timeout(30):
        while (await d.get(f"/v1/commits/{commit}")).status != 404:
            await asyncio.sleep(0.05)


async def aborted(d: Daemon, vm: str, disk: str) -> str:
    """A commit that was aborted when it was READY; its id."""
    policy = {"kind": "abort"}
    commit = await d.commit(vm, disk=disk, policy=policy)
    found: Any = await d.end_of(commit)
    assert found["outcome"]["action"] == "abort"
    return commit


async def test_what_has_not_ended_keeps_its_key(folder: Path) -> None:
    chains = make_chain(folder), make_chain(folder, names=OTHERS)
    async with (
        storage_daemon(sub(folder, "qemu1"), chains[0]) as one,
        storage_daemon(sub(folder, "qemu2"), chains[1]) as two,
        daemon(
            folder,
            SHORT + vm_called("web1", one) + vm_called("web2", two),
        ) as d,
    ):
        await d.connected("web1")
        await d.connected("web2")
        made = (await d.post("/v1/vms/web1/commits", HOLD, Idempotency_Key="one")).json["id"]
        await d.until(made, "ready")
        await gone(d, await aborted(d, "web2", "top2"))
        again = await d.post("/v1/vms/web1/commits", HOLD, Idempotency_Key="one")
        assert (again.status, again.json["id"]) == (202, made)
        await d.post(f"/v1/commits/{made}/decision", {"action": "keep"})
        await gone(d, made)
        assert (await d.get("/v1/commits")).json == []
        assert await d.stop() == 0
    assert_disk(chains[0].base, chains[0].pictures[-1])


async def test_a_base_that_is_whole_under_its_overlay_only_is_not_forgotten(folder: Path) -> None:
    chains = make_chain(folder, 2), make_chain(folder, names=OTHERS)
    async with (
        machine(sub(folder, "qemu1"), chains[0], running=True) as vm,
        storage_daemon(sub(folder, "qemu2"), chains[1]) as two,
        daemon(
            folder,
            SHORT + config_of(vm, keep_if='["false"]') + vm_called("web2", two),
        ) as d,
    ):
        await d.connected("web1")
        await d.connected("web2")
        await aborted(d, "web1", "vda")
        await gone(d, await aborted(d, "web2", "top2"))
        refused = await end_of(d, await ask(d))
        assert "holds part of" in refused["error"]["message"]
        assert await d.stop() == 0
        await vm.quit()
    assert_disk(chains[0].top, chains[0].pictures[-1])
