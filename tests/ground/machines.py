"""Real QEMUs: virtual machines and storage daemons, started for one test."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qemu.qmp import ConnectError, ExecuteError, QMPClient

from tests.ground.images import Chain
from tests.ground.qemu import QEMU, Qemu

Style = Literal["blockdev", "drive", "implicit"]

_SO_ACCEPTCON = 1 << 16
"""The kernel's flag of a socket that listens, as ``/proc/net/unix`` shows it."""


@dataclass
class Machine:
    """A running QEMU; `qmp` and `qmp2` are its monitors, `nbd` its export's socket."""

    process: asyncio.subprocess.Process
    folder: Path
    qmp: str
    qmp2: str = ""
    nbd: str = ""
    pid: int = 0
    stderr: Path = field(default_factory=Path)

    def signal(self, number: int) -> None:
        """SIGKILL, SIGSTOP, SIGCONT."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL: it ends where it stands."""
        self.signal(signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP: it hangs, its connections stay open."""
        self.signal(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT: it goes on after `stop`."""
        self.signal(signal.SIGCONT)

    async def quit(self) -> None:
        """End it in an orderly way, over its second monitor, so that its images can be read."""
        client = await self._client()
        if self.nbd:
            # QEMU 5.2's daemon does not close, and so not flush, what an export still serves.
            with suppress(ExecuteError), client.listener("BLOCK_EXPORT_DELETED") as deleted:
                await client.execute("block-export-del", {"id": "export0", "mode": "hard"})
                await deleted.get()
        await client.execute("quit")
        with suppress(EOFError, OSError):
            await client.disconnect()
        await self.ended()

    async def execute(self, command: str, **arguments: object) -> Any:
        """One command over the second monitor, as another client would send it."""
        client = await self._client()
        try:
            given = {k.replace("_", "-"): v for k, v in arguments.items()}
            return await client.execute(command, given or None)
        finally:
            await client.disconnect()

    async def _client(self) -> QMPClient:
        """A client of the second monitor; QEMU may send an event before its greeting."""
        for _ in range(5):
            client = QMPClient()
            with suppress(ConnectError):
                await client.connect(self.qmp2)
                return client
        raise AssertionError("QEMU's second monitor does not greet")

    async def ended(self) -> None:
        """Wait until it is gone."""
        async with asyncio.timeout(20):
            await self.process.wait()


def node_options(chain: Chain, style: Style = "blockdev", fmt: str = "qcow2") -> list[str]:
    """``-blockdev`` options that make the chain's layers nodes called as their files."""
    if style == "implicit":
        top = chain.top
        return [f"driver=qcow2,node-name={top.stem},file.driver=file,file.filename={top}"]
    options = []
    below = ""
    for number, path in enumerate(chain.files):
        driver = fmt if number == 0 else "qcow2"
        backing = f",backing={below}" if below else ""
        options.append(
            f"driver={driver},node-name={path.stem},file.driver=file,file.filename={path}{backing}"
        )
        below = path.stem
    return options


@asynccontextmanager
async def machine(
    folder: Path,
    *chains: Chain,
    style: Style = "blockdev",
    device: str | Sequence[str] = "virtio-blk-pci",
    iothread: bool = False,
    filters: Sequence[str] = (),
    fmt: str = "qcow2",
    extra: Sequence[str] = (),
    tcp: int | None = None,
    running: bool = False,
    qemu: Qemu = QEMU,
) -> AsyncIterator[Machine]:
    """A ``qemu-system-x86_64`` that has not started its (absent) guest, or has, if `running`.

    Its disks are ``vda``, ``vdb``, ..., all of one `device` or each of its own; `filters`
    (``throttle``, ``copy-on-read``) lie over the first one's active layer. With `style` "drive",
    each is a ``-drive`` called ``drive0``, ...
    """
    assert qemu.system, "no qemu-system-x86_64"
    qmp, qmp2 = folder / "qmp", folder / "qmp2"
    first = f"tcp:127.0.0.1:{tcp},server=on,wait=off" if tcp else f"unix:{qmp},server=on,wait=off"
    held = [] if running else ["-S"]
    command = [qemu.system, *held, "-display", "none", "-nodefaults", "-machine", "q35,accel=tcg",
               "-m", "64", "-qmp", first, "-qmp", f"unix:{qmp2},server=on,wait=off"]  # fmt: skip
    if iothread:
        command += ["-object", "iothread,id=io0"]
    devices = [device] * len(chains) if isinstance(device, str) else device
    if "scsi-hd" in devices:
        command += ["-device", "virtio-scsi-pci" + (",iothread=io0" if iothread else "")]
    for number, (chain, kind) in enumerate(zip(chains, devices, strict=True)):
        letter = "abcdefgh"[number]
        if style == "drive":
            drive = f"drive{number}"
            command += ["-drive", f"file={chain.top},format=qcow2,if=none,id={drive}"]
        else:
            for options in node_options(chain, style, fmt):
                command += ["-blockdev", options]
            drive = chain.top.stem
            for filter_ in filters if number == 0 else ():
                more = ",throttle-group=tg0" if filter_ == "throttle" else ""
                if filter_ == "throttle":
                    command += ["-object", "throttle-group,id=tg0"]
                command += [
                    "-blockdev",
                    f"driver={filter_},node-name={filter_}0,file={drive}{more}",
                ]
                drive = f"{filter_}0"
        thread = ",iothread=io0" if iothread and kind == "virtio-blk-pci" else ""
        command += ["-device", f"{kind},drive={drive},id=vd{letter}{thread}"]
    command += extra
    async with _running(command, folder, [qmp2] if tcp else [qmp, qmp2]) as made:
        if tcp:
            made.qmp = f"tcp:127.0.0.1:{tcp}"
        made.qmp2 = str(qmp2)
        yield made


@asynccontextmanager
async def storage_daemon(
    folder: Path, chain: Chain, *, style: Style = "blockdev", export: bool = True,
    fmt: str = "qcow2", wrap: Sequence[str] = (), qemu: Qemu = QEMU,
) -> AsyncIterator[Machine]:  # fmt: skip
    """A ``qemu-storage-daemon`` with the chain, its active layer exported over NBD.

    `wrap` is a command that becomes it, as ``unshare`` does.
    """
    assert qemu.daemon, "no qemu-storage-daemon"
    qmp, qmp2, nbd = folder / "qmp", folder / "qmp2", folder / "nbd"
    command = [*wrap, qemu.daemon]
    for number, path in enumerate((qmp, qmp2)):
        command += ["--chardev", f"socket,id=c{number},path={path},server=on,wait=off"]
        command += ["--monitor", f"chardev=c{number}"]
    for options in node_options(chain, style, fmt):
        command += ["--blockdev", options]
    if export:
        command += ["--nbd-server", f"addr.type=unix,addr.path={nbd},max-connections=4"]
        command += ["--export", f"nbd,id=export0,node-name={chain.top.stem},writable=on"]
    async with _running(command, folder, [qmp, qmp2, *([nbd] if export else [])]) as made:
        made.qmp2 = str(qmp2)
        made.nbd = str(nbd)
        yield made


def listening(sockets: Iterable[Path]) -> bool:
    """Whether all of them accept connections; the files are there before that.

    Asked of the kernel: a monitor serves one client at a time, and a test's may be the next.
    """
    accepts = set()
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and int(words[3], 16) & _SO_ACCEPTCON:
            accepts.add(words[7])
    return all(str(path) in accepts for path in sockets)


@asynccontextmanager
async def _running(command: list[str], folder: Path, sockets: list[Path]) -> AsyncIterator[Machine]:
    stderr = folder / "stderr"
    with stderr.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file, cwd=folder
        )
    try:
        async with asyncio.timeout(30):
            while not listening(sockets):
                if process.returncode is not None:
                    raise AssertionError(f"{command} ended: {stderr.read_text()}")
                await asyncio.sleep(0.005)  # there is nothing to wait on but the file system
        yield Machine(process, folder, str(sockets[0]), pid=process.pid, stderr=stderr)
    except BaseException:
        print(f"{command[0]}: {stderr.read_text(errors='replace')}")
        raise
    finally:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
            process.kill()
        await process.wait()
