"""The VMs that are known: their names, and how they come and go."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpcommit.daemon.config import Config
from qmpcommit.daemon.registry import VM, Registry, name_of
from qmpcommit.errors import ConnectError, MonitorLost
from qmpcommit.qmp.process import is_alive, process_identity
from tests.ground.fake_monitor import fake_monitor


@pytest.mark.parametrize(
    ("pattern", "path", "name"),
    [
        ("/run/vms/*/qmp.sock", "/run/vms/web1/qmp.sock", "web1"),
        ("/run/vms/*.qmp", "/run/vms/web1.qmp", "web1"),
        ("/run/vms/vm-*-qmp", "/run/vms/vm-a-b-qmp", "a-b"),
        ("/run/*/vm?/qmp", "/run/web1/vm0/qmp", "web1"),
        ("/run/vms/*/*.sock", "/run/vms/web1/qmp.sock", "web1"),
        ("/run/vms/[a-z]*/qmp", "/run/vms/web1/qmp", "web1"),
    ],
)
def test_the_name_is_what_the_star_stands_for(pattern: str, path: str, name: str) -> None:
    assert name_of(pattern, path) == name


def test_a_process_is_not_mistaken_for_a_later_one() -> None:
    identity = process_identity(os.getpid())
    assert is_alive(identity)
    assert not is_alive(f"{os.getpid()}.1")
    assert not is_alive("")
    assert process_identity(None) == process_identity(0) == process_identity(2**22 + 1) == ""


@asynccontextmanager
async def registry(
    config: dict[str, Any],
    log: list[tuple[str, str]] | None = None,
    first: Callable[[VM], Awaitable[object]] | None = None,
) -> AsyncIterator[Registry]:
    seen = log if log is not None else []

    async def on_up(vm: VM) -> None:
        seen.append((vm.name, "up"))

    made = Registry(
        Config.model_validate(config), first or on_up, lambda vm, what: seen.append((vm.name, what))
    )
    made.start()
    try:
        yield made
    finally:
        await made.close()


async def until(registry: Registry, *names: str) -> None:
    async with asyncio.timeout(20):
        while set(registry.vms) != set(names):
            await asyncio.sleep(0.01)


async def test_sockets_appear_vanish_and_move(folder: Path) -> None:
    rules = [
        {"glob": f"{folder}/a/*/qmp", "connect": "on-demand"},
        {"glob": f"{folder}/b/*/qmp", "connect": "on-demand"},
    ]
    for name in ("a/web1/qmp", "a/bad name/qmp", "a/.hidden/qmp", f"a/{'x' * 80}/qmp"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    async with registry({"discover": rules, "discover_every": 0.05}) as known:
        assert set(known.vms) == {"web1"}, "there from the first"
        (folder / "b/web2").mkdir(parents=True)
        (folder / "b/web2/qmp").touch()
        await until(known, "web1", "web2")
        first = known.vms["web1"]
        (folder / "b/web1").mkdir()
        (folder / "b/web1/qmp").touch()  # the name is taken, as long as the first is there
        (folder / "b/web2/qmp").unlink()
        await until(known, "web1")
        assert known.vms["web1"] is first
        (folder / "a/web1/qmp").unlink()
        async with asyncio.timeout(20):
            while known.vms.get("web1", first) is first:
                await asyncio.sleep(0.01)
        assert known.vms["web1"].qmp == f"{folder}/b/web1/qmp"


async def test_who_was_configured_or_added_is_not_found_again(folder: Path) -> None:
    (folder / "web1").touch()
    config = {
        "vm": [{"name": "web1", "qmp": "/nowhere", "connect": "on-demand"}],
        "discover": [{"glob": f"{folder}/*", "connect": "on-demand"}],
    }
    async with registry(config) as known:
        known.discover()
        assert (known.vms["web1"].origin, known.vms["web1"].qmp) == ("config", "/nowhere")
        (folder / "web1").unlink()
        known.discover()
        await known.remove("absent")
        assert set(known.vms) == {"web1"}


async def test_one_in_use_stays_until_it_is_let_go(folder: Path) -> None:
    config = {
        "discover": [{"glob": f"{folder}/*/fake", "connect": "on-demand"}],
        "discover_every": 0.05,
    }
    (folder / "web1").mkdir()
    async with fake_monitor(folder / "web1") as fake, registry(config) as known:
        async with known.use(known.vms["web1"]) as session:
            Path(fake.path).unlink()
            known.discover()
            assert await session.execute("query-status") == {}
            assert set(known.vms) == {"web1"}
        await until(known)


async def test_on_demand_is_connected_only_while_it_is_used(folder: Path) -> None:
    config = {"vm": [{"name": "web1", "qmp": f"{folder}/fake", "connect": "on-demand"}]}
    log: list[tuple[str, str]] = []
    async with fake_monitor(folder) as fake, registry(config, log) as known:
        vm = known.vms["web1"]
        assert (vm.state, fake.connections) == ("idle", 0)
        async with known.use(vm), known.use(vm):
            assert (vm.state, fake.connections) == ("connected", 1)
        assert (vm.state, vm.session) == ("idle", None)
        async with known.use(vm):
            assert fake.connections == 2
    assert log.count(("web1", "up")) == 2
    async with registry(config) as known:
        with pytest.raises(ConnectError, match="connect to the monitor"):
            async with known.use(known.vms["web1"]):
                raise AssertionError("nobody is there")
        assert known.vms["web1"].users == 0


async def test_a_lost_connection_comes_back(folder: Path) -> None:
    log: list[tuple[str, str]] = []
    config = {"vm": [{"name": "web1", "qmp": f"{folder}/fake"}]}
    async with fake_monitor(folder) as fake, registry(config, log) as known:
        for number in range(3):
            async with asyncio.timeout(20):
                await known.vms["web1"].up.wait()
            assert fake.connections == number + 1
            fake.drop()
            async with asyncio.timeout(20):
                await known.vms["web1"].lost.wait()
    assert log.count(("web1", "lost")) >= 2


@pytest.mark.parametrize("error", [MonitorLost("not now"), RuntimeError("a bug")], ids=repr)
async def test_what_has_to_be_done_first_is_tried_until_it_is_done(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpcommit.daemon.registry.BACKOFF", (0.01, 0.02))
    config = {"vm": [{"name": "web1", "qmp": f"{folder}/fake"}]}
    tried = 0
    enough, done = asyncio.Event(), asyncio.Event()

    async def first(vm: VM) -> None:
        nonlocal tried
        tried += 1
        if not enough.is_set():
            if tried == 3:
                enough.set()
            raise error
        done.set()

    async with fake_monitor(folder) as fake, registry(config, None, first) as known:
        vm = known.vms["web1"]
        async with asyncio.timeout(20):
            await enough.wait()
            assert (vm.state, done.is_set()) == ("away", False)
            await done.wait()
            async with known.use(vm):
                assert (vm.state, vm.error) == ("connected", None)
        assert (tried, fake.connections) == (4, 1), "once it is done it is not done again"


async def test_nobody_uses_a_vm_before_that_is_done(folder: Path) -> None:
    async def never(vm: VM) -> None:
        raise MonitorLost("not now")

    config = {"vm": [{"name": "web1", "qmp": f"{folder}/fake"}]}
    async with fake_monitor(folder), registry(config, None, never) as known:
        for _ in range(3):
            with pytest.raises((MonitorLost, ConnectError)):
                async with known.use(known.vms["web1"], wait=20):
                    raise AssertionError("nothing was resolved")


async def test_monitors_that_hang_keep_no_others_waiting(folder: Path) -> None:
    """More of them than may connect at once."""
    config: dict[str, Any] = {"limits": {"connects": 4}, "vm": []}
    (folder / "mute").mkdir()
    (folder / "well").mkdir()
    async with (
        fake_monitor(folder / "mute", greeting=b"") as mute,
        fake_monitor(folder / "well") as well,
    ):
        for number in range(8):
            config["vm"].append({"name": f"mute{number}", "qmp": mute.path})
        config["vm"].append({"name": "well", "qmp": well.path})
        async with registry(config) as known:
            async with asyncio.timeout(80):
                await known.vms["well"].up.wait()
                well.drop()
                await known.vms["well"].lost.wait()
                await known.vms["well"].up.wait()
            assert mute.connections <= 12, "it waited behind monitors that hang"
            async with known.use(known.vms["well"], wait=20):
                assert known.vms["well"].state == "connected"
            assert all(vm.session is None or not vm.up.is_set() for vm in known.vms.values()
                       if vm.name != "well")  # fmt: skip


@pytest.mark.parametrize("connect", ["keep", "on-demand"])
async def test_everybody_gets_an_error_of_their_own(folder: Path, connect: str) -> None:
    """Who adds the disk that they wanted adds it to nobody else's."""
    config = {"vm": [{"name": "web1", "qmp": f"{folder}/none", "connect": connect}]}
    async with registry(config) as known:
        vm, errors = known.vms["web1"], list[ConnectError]()
        for disk in ("vda", "vdb"):
            async with asyncio.timeout(20):
                while not errors or errors[-1].disk is not None:
                    with pytest.raises(ConnectError) as raised:
                        async with known.use(vm):
                            raise AssertionError("there is nothing to connect to")
                    if vm.error is not None:
                        errors.append(raised.value)
                    await asyncio.sleep(0.01)
            errors[-1].add(disk=disk)
        assert [error.disk for error in errors] == ["vda", "vdb"]
        assert errors[0].message == errors[1].message
        assert vm.error is not None
        assert vm.error.disk is None
