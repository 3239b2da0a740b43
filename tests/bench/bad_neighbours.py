"""How fast a VM's READY is answered while ten other monitors are hostile, and while none is.

    python -m tests.bench.bad_neighbours [ROUNDS]

Rounds without and with them follow each other in one run. In each, 40 commits become READY within
one second; what is measured is the time from the event on the wire to the decision on the wire,
its record durable before it. The hostile ones are made known anew before each round with them, so
that the pauses for which they are put off are short yet. They are a process of their own, and one
that waits where the host is busy: what is measured is the daemon, not how its host parts its
processors.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.bench.daemon_scale import Host, all_connected, commits, config, host, record
from tests.cli.command import ENVIRONMENT
from tests.daemon.daemons import Daemon
from tests.hostile.test_monitors import GREETS, HOSTILE, LONG, MB, STAMP, Serve, messages_of

VMS = 40


def flooding(events: bytes) -> Serve:
    """A monitor that answers all, and tells of these events as fast as they are read."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETS)
        begun = asyncio.Event()

        async def answer() -> None:
            async for asked in messages_of(reader):
                value = "{}" if asked["execute"] == "qmp_capabilities" else "[]"
                known_as = json.dumps(asked.get("id"))
                writer.write(f'{{"return": {value}, "id": {known_as}}}\n'.encode())
                begun.set()

        answering = asyncio.create_task(answer())
        await begun.wait()
        try:
            while True:
                writer.write(events)
                await writer.drain()
        finally:
            answering.cancel()

    return serve


floods = flooding(f'{{"event": "RTC_CHANGE", {STAMP}, "data": {{"offset": 1}}}}\n'.encode() * 500)


async def never_ends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A greeting of 58 MB."""
    writer.write(b'{"QMP": "' + b"x" * (58 * MB) + b'"}\n')
    await writer.drain()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Greets, and answers nothing."""
    writer.write(GREETS)
    await reader.read()


async def greets_long(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A greeting that is a little too long."""
    writer.write(LONG)
    await reader.read()


TEN: tuple[Serve, ...] = (*HOSTILE.values(), floods, floods, never_ends, silent, greets_long)


async def be_hostile(folder: Path) -> None:
    """The process of the hostile ones."""

    async def one(serve: Serve, r: asyncio.StreamReader, w: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.CancelledError):
            await serve(r, w)
        w.transport.abort()

    os.nice(10)
    for number, serve in enumerate(TEN):
        await asyncio.start_unix_server(
            lambda r, w, serve=serve: one(serve, r, w),  # type: ignore[misc]
            folder / f"evil{number}",
        )
    print("listening", flush=True)
    await asyncio.Event().wait()


@asynccontextmanager
async def hostile(folder: Path) -> AsyncIterator[None]:
    """They listen."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.bad_neighbours", "--hostile", str(folder),
        stdout=asyncio.subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout is not None
    assert await process.stdout.readline() == b"listening\n"
    try:
        yield
    finally:
        process.kill()
        await process.wait()


async def reactions(d: Daemon, fake: Host, folder: Path, *, beside: bool) -> list[float]:
    """Those of one round, in milliseconds."""
    await fake.say("reset")
    evil = [f"evil{number}" for number in range(len(TEN))] if beside else []
    for name in evil:
        answer = await d.post("/v1/vms", {"name": name, "qmp": str(folder / name)})
        assert answer.status == 201, answer.body
    await commits(d, VMS)
    await fake.until("copying", VMS)
    await fake.say("ready 1.0")
    figures = await fake.until("ended", VMS)
    for name in evil:
        await d.request("DELETE", f"/v1/vms/{name}")
    await asyncio.sleep(0.5)
    return [1000 * seconds for seconds in figures["reactions"]]


async def measure(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="qc-", dir="/dev/shm") as name:
        folder = Path(name)
        (vms := folder / "vms").mkdir()
        await record(folder)
        (vms / "replies.json").write_text((folder / "replies.json").read_text())
        state = Path(tempfile.mkdtemp(prefix="qc-daemon-"))
        d = Daemon(state, config(vms, VMS), log_level="warning")
        seen: dict[bool, list[float]] = {False: [], True: []}
        async with host(vms, VMS, 2) as fake, hostile(folder):
            try:
                await d.start()
                await all_connected(d, VMS)
                await reactions(d, fake, folder, beside=False)  # which warms up
                for number in range(2 * rounds):
                    beside = bool(number % 2)
                    seen[beside] += await reactions(d, fake, folder, beside=beside)
            finally:
                await d.kill()
    print(f"{time.strftime('%F %T')}, {VMS} VMs, {rounds} rounds each\n")
    print("| hostile monitors | READY | p50 ms | p99 ms | last ms |")
    print("|---|---|---|---|---|")
    p99 = {}
    for beside, found in seen.items():
        found.sort()
        p99[beside] = found[int(len(found) * 0.99) - 1]
        print(
            f"| {len(TEN) if beside else 'none'} | {len(found)} | {statistics.median(found):.2f} |"
            f" {p99[beside]:.1f} | {found[-1]:.1f} |"
        )
    print(f"\np99 with them is {p99[True] / p99[False]:.2f} times that without")


def main() -> None:
    if sys.argv[1:2] == ["--hostile"]:
        asyncio.run(be_hostile(Path(sys.argv[2])))
    else:
        asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 10))


if __name__ == "__main__":
    main()
