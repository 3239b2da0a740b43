"""The session: connecting, what is no monitor, loss and return, events, typed answers."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

import qmpcommit as qc
from qmpcommit.qmp.address import Address
from qmpcommit.qmp.events import BlockJobReady, JobStatusChange, Stop
from tests.ground.fake_monitor import GREETING, FakeMonitor, Refusal, fake_monitor
from tests.ground.images import MIB, assert_disk, make_chain
from tests.ground.machines import machine, storage_daemon
from tests.ground.proxy import proxy
from tests.ground.sessions import hurried

BULK = 33 * MIB

# -- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/q", Address(path="/run/q")),
        ("unix:/run/q", Address(path="/run/q")),
        (Path("/run/q"), Address(path="/run/q")),
        ("tcp:localhost:4444", Address(host="localhost", port=4444)),
        ("tcp:[::1]:4444", Address(host="::1", port=4444)),
    ],
)
def test_addresses(text: Any, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "unix:", "a\0b", "/" + "x" * 200, "tcp:", "tcp:h", "tcp:h:", "tcp::1", "tcp:h:0",
             "tcp:h:65536", "tcp:h:x", "tcp:h:²"])  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(qc.InvalidRequest):
        qc.Session.connect(text)


# -- what is no monitor ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    [
        b"\x00\xff garbage\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b'{"jsonrpc": "2.0"}\n',
        b"[]\n",
        b"5\n",
        b'{"QMP": 5}\n',
        b'{"QMP": {"version": 1, "capabilities": 2}}\n',
        b"[" * 100_000 + b"\n",
        json.dumps(GREETING).encode() + b"\nnonsense\n",
    ],
    ids=lambda g: g[:20],
)
async def test_what_greets_otherwise_is_no_monitor(greeting: bytes, folder: Path) -> None:
    async with fake_monitor(folder, greeting=greeting) as fake:
        with pytest.raises(qc.ConnectError, match="not a QMP monitor") as error:
            await qc.Session.connect(fake.path)
        assert type(error.value) is qc.ConnectError
        assert error.value.address == fake.path


async def test_a_silent_socket_is_busy_or_no_monitor_in_bounded_time(folder: Path) -> None:
    async with fake_monitor(folder, greeting=b"") as fake:
        with pytest.raises(qc.MonitorBusy, match="second monitor"):
            await qc.Session.connect(fake.path, timeout=0.2)


async def test_a_monitor_that_another_client_holds_is_busy(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu:
        async with qc.Session.connect(qemu.qmp):
            with pytest.raises(qc.MonitorBusy, match="-qmp"):
                await qc.Session.connect(qemu.qmp, timeout=0.3)
        async with qc.Session.connect(qemu.qmp) as vm:
            assert (await vm.query_status()).status == "prelaunch"


async def test_a_monitor_that_others_wait_for_is_busy_too(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu:
        async with qc.Session.connect(qemu.qmp):
            waiting: list[socket.socket] = []
            with suppress(BlockingIOError):  # there is no room for more
                while True:
                    waiting.append(socket.socket(socket.AF_UNIX))
                    waiting[-1].setblocking(False)
                    waiting[-1].connect(qemu.qmp)
            with pytest.raises(qc.MonitorBusy, match="has others waiting"):
                await qc.Session.connect(qemu.qmp, timeout=0.2)
            late = asyncio.create_task(qc.Session.connect(qemu.qmp, timeout=30).open())
            while waiting:
                waiting.pop().close()
        async with await late as vm:
            assert (await vm.query_status()).status == "prelaunch"


async def test_nothing_there(folder: Path, free_port: int) -> None:
    (folder / "file").touch()
    for address in (folder / "none", folder / "file", f"tcp:127.0.0.1:{free_port}"):
        with pytest.raises(qc.ConnectError, match="can't connect"):
            await qc.Session.connect(address)


async def test_connecting_can_be_cancelled(folder: Path) -> None:
    async with fake_monitor(folder, greeting=b"") as fake:
        task = asyncio.ensure_future(qc.Session.connect(fake.path, timeout=60).open())
        await fake.connected.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# -- events and typed answers ---------------------------------------------------------------------


async def test_events_are_typed_and_none_falls_between(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        vm = qc.Session.connect(qemu.qmp)
        with vm.events() as everything, vm.events("BLOCK_JOB_READY", "STOP") as some:
            async with vm:
                await vm.execute("cont")
                await vm.execute("stop")
                await (await vm.commit("vda", policy=qc.Pivot())).wait()
            heard = [event async for event in everything]
            chosen = [event async for event in some]
    assert [type(event) for event in chosen] == [Stop, BlockJobReady]
    statuses = [e.status for e in heard if isinstance(e, JobStatusChange)]
    assert statuses[:3] == ["created", "running", "ready"]
    assert statuses[-2:] == ["concluded", "null"]
    assert all(event.timestamp is not None for event in heard)


async def test_a_flood_of_events_costs_no_memory(folder: Path) -> None:
    async with fake_monitor(folder) as fake, qc.Session.connect(fake.path) as vm:
        with vm.events("FLOOD", limit=10) as stream, vm.events("END") as last:
            for number in range(1000):
                fake.event("FLOOD", number=number)
            fake.event("END")
            await anext(last)
            assert stream.missed == 990
            first = await anext(stream)
            assert isinstance(first, qc.UnknownEvent)
            assert first.data == {"number": 990}


async def test_typed_answers_of_a_real_qemu(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        assert (await vm.query_version()).qemu.major >= 5
        (info,) = await vm.query_block()
        assert info.inserted is not None
        assert info.inserted.image.backing_image is not None
        nodes = {node.node_name: node for node in await vm.query_named_block_nodes()}
        assert nodes["top"].image.virtual_size == 64 * MIB
        features = await vm.features()
        assert features.has_command("block-commit")
        assert not features.has_command("block-commute")
        assert features.has_argument("block-commit", "top-node")
        assert features.has_argument("blockdev-add", "lazy-refcounts"), "a variant's member"
        assert not features.has_argument("block-commit", "sideways")
        assert features.has_event("BLOCK_JOB_READY")
        assert "block-commit" in {entry.name for entry in await vm.query_qmp_schema()}
        job = await vm.commit("vda", policy=qc.Hold())
        await job.ready()
        (block_job,) = await vm.query_block_jobs()
        assert (block_job.device, block_job.ready, block_job.auto_dismiss) == (job.id, True, False)
        with pytest.raises(qc.CommandRefused) as error:
            await vm.execute("blockdev-del", node_name="nothing")
        assert error.value.error_class == "GenericError"
        assert error.value.command == "blockdev-del"


async def test_typed_answers_of_a_real_storage_daemon(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        (export,) = await vm.query_block_exports()
        assert (export.id, export.type, export.node_name) == ("export0", "nbd", "top")
        assert not export.shutting_down


async def test_answers_that_are_not_qemus(folder: Path) -> None:
    async def nonsense(command: str, arguments: dict[str, Any]) -> Any:
        return [{"some": "thing"}] if command == "query-jobs" else {"status": 5}

    async with fake_monitor(folder, nonsense) as fake, qc.Session.connect(fake.path) as vm:
        with pytest.raises(qc.ProtocolViolation, match="query-jobs"):
            await vm.query_jobs()
        with pytest.raises(qc.ProtocolViolation, match="query-status"):
            await vm.query_status()


# -- loss and return ------------------------------------------------------------------------------


async def test_a_command_that_is_not_answered_ends_in_time(folder: Path) -> None:
    forever = asyncio.Event()

    async def silent(command: str, arguments: dict[str, Any]) -> None:
        await forever.wait()

    async with (
        fake_monitor(folder, silent) as fake,
        qc.Session.connect(fake.path, command_timeout=0.2) as vm,
    ):
        with pytest.raises(qc.DeadlineExceeded, match="query-jobs"):
            await vm.execute("query-jobs")


async def test_a_command_whose_reply_is_lost_is_told_so_and_not_sent_again(folder: Path) -> None:
    async def cut(command: str, arguments: dict[str, Any]) -> Any:
        if command == "stop":
            fake.drop()
            await asyncio.Event().wait()
        return {}

    async with fake_monitor(folder, cut) as fake, qc.Session.connect(fake.path) as vm:
        with pytest.raises(qc.MonitorLost, match="may or may not"):
            await vm.execute("stop")
        await vm.execute("cont")
        assert [command for command, _ in fake.commands] == ["stop", "cont"]
        assert fake.connections == 2


@pytest.mark.parametrize("garbage", [b"garbage\n", b"[" * 5000 + b"\n", b'{"a": 1}\n' * 3])
async def test_garbage_in_mid_session_hurts_nobody(garbage: bytes, folder: Path) -> None:
    async with fake_monitor(folder) as fake, qc.Session.connect(fake.path) as vm:
        fake.send(garbage)
        for _ in range(3):
            try:
                await vm.execute("query-status")
            except qc.MonitorLost:
                continue
        assert await vm.execute("query-status") == {}


async def test_a_line_of_12_megabytes_is_read(folder: Path) -> None:
    async def big(command: str, arguments: dict[str, Any]) -> str:
        return "x" * (12 * MIB)

    async with fake_monitor(folder, big) as fake, qc.Session.connect(fake.path) as vm:
        assert len(await vm.execute("query-something")) == 12 * MIB


async def test_a_vm_that_is_gone_is_told_so(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, qc.Session.connect(qemu.qmp) as vm:
        qemu.signal(signal.SIGKILL)
        await qemu.ended()
        with pytest.raises((qc.VMGone, qc.MonitorLost)):
            await vm.execute("query-status")
        with pytest.raises(qc.VMGone):
            await vm.execute("query-status")


async def test_a_closed_session_is_closed(folder: Path) -> None:
    async with fake_monitor(folder) as fake:
        async with qc.Session.connect(fake.path) as vm:
            pass
        with pytest.raises(qc.SessionClosed, match="closed"):
            await vm.execute("query-status")
        await vm.close()


async def test_one_that_is_lost_or_closed_as_soon_as_it_is_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_monitor(folder) as fake, qc.Session.connect(fake.path) as vm:

        async def restore() -> None:
            """It comes back, and goes before anything can be sent."""

        lost = asyncio.Event()
        vm.subscribers.add(lambda message: None, lambda up: lost.set())
        fake.drop()
        async with asyncio.timeout(20):
            await lost.wait()
        monkeypatch.setattr(vm, "restore", restore)
        with pytest.raises(qc.MonitorLost, match="lost again before query-status was sent"):
            await vm.execute("query-status")
        await vm.close()
        with pytest.raises(qc.MonitorLost, match="closed"):
            await vm.execute("query-status")


async def test_closing_ends_a_connection_that_is_being_made(folder: Path) -> None:
    """It would hold the monitor, and nobody could close it any more."""
    async with fake_monitor(folder, greeting=b"") as fake:
        vm = qc.Session.connect(fake.path, timeout=60)
        opening = asyncio.create_task(vm.open())
        async with asyncio.timeout(20):
            await fake.connected.wait()
            await vm.close()
            with pytest.raises(qc.MonitorLost, match="closed"):
                await opening
            await fake.all_closed()


# -- a commit over a monitor that fails -----------------------------------------------------------


def once(name: str, fate: str) -> Callable[[dict[str, Any]], str]:
    """A hook: the first message about `name` meets its fate, all else passes."""
    left = [fate]

    def hook(message: dict[str, Any]) -> str:
        hit = name in (message.get("execute"), message.get("event")) or (
            name == message.get("data", {}).get("status")
        )
        return left.pop() if hit and left else "pass"

    return hook


MESSAGES = [
    ("to_qemu", "block-commit"),
    ("to_client", "created"),
    ("to_client", "running"),
    ("to_client", "BLOCK_JOB_READY"),
    ("to_client", "ready"),
    ("to_qemu", "job-complete"),
    ("to_client", "waiting"),
    ("to_client", "BLOCK_JOB_COMPLETED"),
    ("to_client", "concluded"),
    ("to_qemu", "query-jobs"),
    ("to_qemu", "job-dismiss"),
    ("to_client", "null"),
]


@pytest.mark.parametrize("fate", ["cut", "cut after"])
@pytest.mark.parametrize(("way", "name"), MESSAGES, ids=lambda m: m)
async def test_a_pivot_over_a_monitor_that_is_cut(
    way: str, name: str, fate: str, folder: Path
) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm, asyncio.timeout(30):
            hook = once(name, fate)
            begun = lambda message: hook(message) if "block-commit" in between.sent else "pass"  # noqa: E731
            setattr(between, way, begun)
            try:
                job = await vm.commit("vda", policy=qc.Pivot())
                outcome = await job.wait()
            except qc.CommitFailed as error:
                # QEMU drops what it has read but not begun when its client hangs up.
                assert name == "block-commit"
                assert "nothing was changed" in error.message
                assert between.sent.count("block-commit") == 1
                outcome = await (await vm.commit("vda", policy=qc.Pivot())).wait()
            else:
                assert between.sent.count("block-commit") == 1
            assert outcome.action == "pivot"
            assert await vm.query_jobs() == []
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_monitor_that_is_away_for_a_while(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        async with qc.Session.connect(between.path) as vm:
            job = await vm.commit("vda", policy=qc.Keep(), bandwidth="20MiB")
            async with qc.Session.connect(qemu.qmp2) as other:
                with other.events("BLOCK_JOB_READY") as ready:
                    await between.refuse()
                    await anext(ready)
            await between.open()
            assert (await job.wait()).action == "keep"
            assert await vm.query_jobs() == []
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_monitor_that_another_client_takes_meanwhile(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        machine(folder, chain) as qemu,
        proxy(folder, qemu.qmp) as between,
        qc.Session.connect(between.path) as vm,
    ):
        job = await vm.commit("vda", policy=qc.Hold())
        await job.ready()
        await between.refuse()
        async with qc.Session.connect(qemu.qmp):
            await between.open()
            lost = pytest.raises(qc.MonitorLost, match="may be running")
            with hurried(vm, patience=0.5), lost as error:
                await job.wait()
            assert error.value.job_id == job.id


async def test_a_shared_client_that_its_owner_connects_again(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu, proxy(folder, qemu.qmp) as between:
        client = QMPClient("web1")
        await client.connect(between.path)
        async with qc.Session.over(client) as vm:
            job = await vm.commit("vda", policy=qc.Hold())
            await job.ready()
            await between.cut()
            with pytest.raises((EOFError, OSError)):
                await client.disconnect()
            await client.connect(between.path)
            await job.pivot()
            assert (await job.wait()).action == "pivot"
        await client.disconnect()
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_shared_client_that_stays_away(folder: Path) -> None:
    async with machine(folder, make_chain(folder)) as qemu, proxy(folder, qemu.qmp) as between:
        client = QMPClient("web1")
        await client.connect(between.path)
        async with qc.Session.over(client, patience=0.3) as vm:
            job = await vm.commit("vda", policy=qc.Hold())
            await between.cut()
            with pytest.raises(qc.MonitorLost):
                await job.wait()
        with pytest.raises((EOFError, OSError)):
            await client.disconnect()


async def test_a_qemu_that_hangs_is_given_up_in_time(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            job = await vm.commit("vda", policy=qc.Hold())
            await job.ready()
            with hurried(vm, patience=1):
                qemu.stop()
                await job.pivot()
                with pytest.raises(qc.MonitorLost):
                    await job.wait()
            qemu.cont()
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_refused_command_is_told_with_qemus_words(folder: Path) -> None:
    async def refuse(command: str, arguments: dict[str, Any]) -> None:
        raise Refusal("not today", "DeviceNotActive")

    async with fake_monitor(folder, refuse) as fake, qc.Session.connect(fake.path) as vm:
        with pytest.raises(qc.CommandRefused, match="not today") as error:
            await vm.execute("stop")
        assert error.value.error_class == "DeviceNotActive"
    assert isinstance(fake, FakeMonitor)


async def test_the_reply_to_a_client_that_has_gone_is_no_breach(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU may send whoever comes next what the one before had asked for, before it greets."""
    late = [json.dumps({"return": ["x" * 100] * 3000, "id": "of another"}).encode() + b"\n"]
    greet = json.dumps(GREETING).encode() + b"\n"

    async with fake_monitor(folder) as fake:
        serve = FakeMonitor.serve

        async def after(*streams: Any) -> None:
            fake._greeting = (late.pop() if late else b"") + greet
            await serve(fake, *streams)

        monkeypatch.setattr(fake, "serve", after)
        server = await asyncio.start_unix_server(after, folder / "late")
        async with server, qc.Session.connect(str(folder / "late")) as vm:
            assert await vm.execute("query-status") == {}
            assert not vm.breach
    assert not late
