"""What never ends, from a monitor: memory does not grow with it, and whoever waits has an end."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit import driver as driver_module
from qmpcommit.qmp import monitor as monitor_module
from qmpcommit.qmp import subscriptions
from tests.ground.fake_monitor import FakeMonitor, fake_monitor
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import machine
from tests.ground.proxy import Proxy, proxy

MANY = 1_500
NOISE = 512 * 1024
"""Bytes that may be in use more or less for any other reason: what a socket's reader has waiting is
384 KiB at most."""


def event(name: str = "RTC_CHANGE", **data: Any) -> dict[str, Any]:
    stamp = {"seconds": 1_700_000_000, "microseconds": 123456}
    return {"event": name, "data": data, "timestamp": stamp}


def line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What qemu.qmp logs of each is not kept by pytest."""
    logger = logging.getLogger("qemu.qmp")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


class Peaks:
    """The most that was in use, in bytes, since `again`."""

    def again(self) -> None:
        gc.collect()
        tracemalloc.reset_peak()

    @property
    def most(self) -> int:
        return tracemalloc.get_traced_memory()[1]


@contextmanager
def traced() -> Iterator[Peaks]:
    gc.collect()
    tracemalloc.start()
    try:
        yield Peaks()
    finally:
        tracemalloc.stop()


@asynccontextmanager
async def flooded(folder: Path) -> AsyncIterator[tuple[FakeMonitor, qc.Session]]:
    async with fake_monitor(folder) as fake, qc.Session.connect(fake.path, patience=0) as vm:
        yield fake, vm


async def grown(fake: FakeMonitor, vm: qc.Session, data: bytes, many: int = MANY) -> int:
    """By how much the peak is higher when all of it comes four more times."""
    with traced() as peaks:
        await fake.flood(data, many)
        await vm.execute("query-status")  # its reply comes behind all of that
        first = peaks.most
        peaks.again()
        await fake.flood(data, 4 * many)
        await vm.execute("query-status")
        return peaks.most - first


@pytest.mark.parametrize("message", [event(), {"return": {}, "id": "nobody's"}, {"no": "sense"}])
async def test_what_nobody_hears_is_not_kept(folder: Path, message: dict[str, Any]) -> None:
    async with flooded(folder) as (fake, vm):
        assert await grown(fake, vm, line(message)) < NOISE


async def test_of_what_a_subscriber_never_reads_the_newest_are_kept(folder: Path) -> None:
    async with flooded(folder) as (fake, vm):
        with vm.events(limit=1000) as never_read:
            assert await grown(fake, vm, line(event())) < NOISE
            assert never_read.missed == 5 * MANY - 1000
            fake.event("STOP")
            await vm.execute("query-status")
            fake.event("RESUME")
            await vm.execute("query-status")
        assert [each.name async for each in never_read][-2:] == ["STOP", "RESUME"]


async def test_large_events_that_are_never_read_are_fewer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "WAITING_BYTES", 1 << 19)
    large = line(event(text="x" * 50_000))
    async with flooded(folder) as (fake, vm):
        with vm.events() as never_read:
            assert await grown(fake, vm, large, 20) < NOISE
            assert never_read.missed == 5 * 20 - 10
        assert len([each async for each in never_read]) == 10


async def test_a_line_without_an_end_is_the_end_of_the_connection(folder: Path) -> None:
    most: list[int] = []

    async def no_reply(command: str, arguments: dict[str, Any]) -> Any:
        await asyncio.Event().wait()

    for size in (4, 16):
        async with (
            fake_monitor(folder, no_reply) as fake,
            qc.Session.connect(fake.path) as vm,
        ):
            with traced() as peaks:
                asked = asyncio.ensure_future(vm.execute("query-status"))
                await fake.flood(b"x" * (1 << 16), size * 16)
                with pytest.raises(qc.MonitorLost, match="lost while query-status was under way"):
                    await asked
                most.append(peaks.most)
    assert max(most) < 8 << 20, most
    assert most[1] - most[0] < NOISE, most


async def test_lines_without_sense_are_the_end_of_the_connection(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor_module, "PUT_OFF", (0.001, 60.0))

    async def garbage(command: str, arguments: dict[str, Any]) -> Any:
        await fake.flood(b"no JSON at all" * 20 + b"\n", MANY)

    most: list[int] = []
    async with (
        fake_monitor(folder, garbage) as fake,
        qc.Session.connect(fake.path) as vm,
    ):
        with traced() as peaks:
            for again in (2, 8):
                peaks.again()
                for _ in range(again):
                    with pytest.raises(qc.MonitorLost):
                        await vm.execute("query-status")
                most.append(peaks.most)
        assert most[1] - most[0] < NOISE


# -- while a commit goes on -----------------------------------------------------------------------


@asynccontextmanager
async def noise(between: Proxy, *messages: dict[str, Any]) -> AsyncIterator[None]:
    """These events, again and again, until this ends."""

    async def without_end() -> None:
        while True:
            for message in messages:
                await between.send(message)
            await asyncio.sleep(0)

    making = asyncio.create_task(without_end())
    try:
        yield
    finally:
        making.cancel()
        await asyncio.wait({making})


@pytest.mark.parametrize("kind", ["of others", "of the job", "that the job concluded"])
async def test_a_commit_ends_well_among_events_without_end(folder: Path, kind: str) -> None:
    chain = make_chain(folder)
    messages = {
        "of others": [event(), event("BLOCK_JOB_READY", device="other", len=1, offset=1)],
        "of the job": [event("JOB_STATUS_CHANGE", id="qmpcommit-j", status="running")],
        "that the job concluded": [
            event("JOB_STATUS_CHANGE", id="qmpcommit-j", status="concluded"),
            event("JOB_STATUS_CHANGE", id="qmpcommit-j", status="paused"),
        ],
    }[kind]
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm, noise(between, *messages):
            job = await vm.commit("vda", policy=qc.Pivot(), job_id="qmpcommit-j")
            assert (await job.wait()).action == "pivot"
            assert await vm.execute("query-jobs") == []
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_events_that_come_faster_than_they_are_taken_are_not_kept_but_qemu_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event of QEMU's own arrives, and no time passes: only that tells how the job goes on."""
    monkeypatch.setattr(driver_module, "HEARTBEAT", 1000.0)
    running = event("JOB_STATUS_CHANGE", id="qmpcommit-j", status="running")
    slow = ("block-commit", "query-jobs", "job-complete")
    chain = make_chain(folder)
    most: list[int] = []

    async def flood_meanwhile(between: Proxy, vm: qc.Session) -> None:
        while True:
            await between.held.wait()
            with vm.events("STOP") as heard, traced() as peaks:
                for _ in range(2 * driver_module.WAITING * (1 + 4 * len(most[:1]))):
                    await between.send(running)
                await between.send(event("STOP"))
                await anext(heard)
                most.append(peaks.most)
            between.release()

    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm, asyncio.timeout(60):
            between.to_client = lambda message: "drop" if about_a_job(message) else "pass"
            between.to_qemu = lambda message: "hold" if message["execute"] in slow else "pass"
            flooding = asyncio.create_task(flood_meanwhile(between, vm))
            job = await vm.commit("vda", policy=qc.Pivot(), job_id="qmpcommit-j")
            assert (await job.wait()).action == "pivot"
            flooding.cancel()
            await asyncio.wait({flooding})
            between.to_qemu = between.to_client = lambda message: "pass"
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert most[1] - most[0] < NOISE, most


def about_a_job(message: dict[str, Any]) -> bool:
    return "JOB" in str(message.get("event"))
