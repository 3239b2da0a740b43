"""Windows over several VMs of the daemon, from the client library and from the command."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import run as qmpcommit
from tests.cli.test_examples import example
from tests.daemon.test_group_windows import NAMES, host
from tests.daemon.test_windows import closed, end_of, overlays
from tests.ground.images import assert_disk

DISKS: list[Any] = [(name, "vda") for name in NAMES]


async def test_the_client_holds_it_open_and_renews_its_lease(folder: Path) -> None:
    async with host(folder) as at, qc.Client(at.d.socket) as client:
        before = {name: at.chains[name][0].pictures[-1].copy() for name in NAMES}
        pairs: list[Any] = [(client.vm("web1"), "vda"), ("db1", "vda")]
        async with client.snapshot(pairs, lease=3) as window:
            assert list(window) == DISKS
            expires = (await at.d.get("/v1/windows?state=open")).json[0]["expires"]
            async with asyncio.timeout(30):
                while (await at.d.get("/v1/windows?state=open")).json[0]["expires"] == expires:
                    pass
            for number, name in enumerate(NAMES):
                assert (window.of[name].quiesced or 0) > 0
                assert window[name, "vda"].filename == str(at.chains[name][0].top)
                await at.writes(name, "vda", number + 3)
                assert_disk(at.chains[name][0].top, before[name])
        actions = [[o.action for o in window.of[name].outcomes] for name in NAMES]
        assert actions == [["pivot"], ["pivot"]]
        await at.nothing_is_left()
        async with client.snapshot([("db1", "vda")]) as alone:  # one VM is several VMs' first
            assert list(alone) == [("db1", "vda")]
        assert [outcome.action for outcome in alone.of["db1"].outcomes] == ["pivot"]
        await at.nothing_is_left()


async def test_how_the_clients_window_may_end(folder: Path) -> None:
    async with host(folder) as at, qc.Client(at.d.socket) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.snapshot(DISKS):
                raise ZeroDivisionError
        await at.nothing_is_left()
        early = client.snapshot(DISKS)
        await early.__aenter__()
        (seen,) = (await at.d.get("/v1/windows?state=open")).json
        await closed(at.d, seen["id"])
        with pytest.raises(qc.WindowError, match="on web1, db1 was closed before"):
            await early.__aexit__(None, None, None)
        for wrong, error in (
            ([], qc.WindowError),
            ([*DISKS, ("db1", "none")], qc.DiskNotFound),
            ([*DISKS, ("none", "vda")], qc.VMNotFound),
        ):
            with pytest.raises(error):
                async with client.snapshot(wrong):
                    pytest.fail("it is open")
        with pytest.raises(qc.InvalidRequest, match="agents has no socket for web1, db1"):
            async with client.snapshot(DISKS, freeze="agent"):
                pytest.fail("it is open")
        await at.nothing_is_left()


async def test_a_window_that_nobody_waits_for_any_more_is_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(folder) as at, qc.Client(at.d.socket) as client:
        ask = client.ask

        async def given_up_when_answered(method: str, *words: Any, **more: Any) -> Any:
            reply = await ask(method, *words, **more)
            if method == "POST":
                opening.cancel()
            return reply

        monkeypatch.setattr(client, "ask", given_up_when_answered)
        opening = asyncio.create_task(client.snapshot(DISKS, lease=3600).__aenter__())
        await asyncio.wait({opening})
        assert opening.cancelled()
        (seen,) = (await at.d.get("/v1/windows")).json
        await end_of(at.d, seen["id"])
        await at.nothing_is_left()


async def test_a_client_that_dies_leaves_it_to_the_lease(folder: Path) -> None:
    async with host(folder) as at, qc.Client(at.d.socket) as client:
        inside = asyncio.Event()

        async def hold() -> None:
            async with client.snapshot(DISKS, lease=1):
                inside.set()
                await asyncio.Event().wait()

        holding = asyncio.create_task(hold())
        await inside.wait()
        (seen,) = (await at.d.get("/v1/windows?state=open")).json
        lease = next(task for task in asyncio.all_tasks() if task.get_name().startswith("lease"))
        lease.cancel()  # as if the client were gone
        assert (await end_of(at.d, seen["id"]))["state"] == "done"
        await at.nothing_is_left()
        holding.cancel()
        await asyncio.wait({holding})
        assert holding.cancelled()


async def test_the_command_is_as_without_a_daemon(folder: Path) -> None:
    async with host(folder) as at:
        daemon = ("--daemon", at.d.socket)
        copies = [folder / f"copy{number}.qcow2" for number in (1, 2)]
        copy = f"cp {{1.vda}} '{copies[0]}' && cp {{2.vda}} '{copies[1]}' && exit 7"
        words = ("window", "web1", "vda", "--and", "db1", "vda")
        said = await qmpcommit(
            *daemon, *words, "--freeze", "pause", "--json", "--", "sh", "-c", copy
        )
        assert said.status == 7, said.err
        assert [each["vm"] for each in said.json["windows"]] == list(NAMES)
        for each, name, made in zip(said.json["windows"], NAMES, copies, strict=True):
            chain = at.chains[name][0]
            assert [disk["filename"] for disk in each["disks"]] == [str(chain.top)]
            assert [outcome["action"] for outcome in each["outcomes"]] == ["pivot"]
            assert each["quiesced"] > 0
            assert_disk(made, chain.pictures[-1])
        loose = await qmpcommit(*daemon, *words, "--", "true")
        assert loose.status == 2
        assert "stand still" in loose.err
        wrong = await qmpcommit(
            *daemon, "window", "web1", "vda", "--and", "db1", "none", "--freeze", "pause",
            "--json", "--", "true",
        )  # fmt: skip
        assert (wrong.status, wrong.error["type"]) == (4, "DiskNotFound")
        assert overlays(folder) == []
        await at.nothing_is_left()


async def test_the_example_backs_all_up_as_they_were(folder: Path) -> None:
    async with host(folder) as at:
        backup = folder / "backup"
        backup.mkdir()
        said = await example("backup_host.py", at.d.socket, str(backup), "web1:vda", "db1:vda")
        assert (said.status, said.err) == (0, "")
        for name in NAMES:
            assert f"{name}: stood still for " in said.out
            assert f"{name}: {at.chains[name][0].top} takes the guest's writes again" in said.out
            assert_disk(backup / f"{name}-vda.qcow2", at.chains[name][0].pictures[-1])
        wrong = await example("backup_host.py", at.d.socket, str(backup), "web1:vda", "db1:none")
        assert wrong.status == 1
        assert wrong.err.startswith("DiskNotFound: ")
        assert "python examples/backup_host.py SOCKET" in (await example("backup_host.py")).err
        await at.nothing_is_left()
