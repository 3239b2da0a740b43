"""A real guest: Debian's kernel on a tiny initramfs, writing files on its disks."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from hashlib import md5
from pathlib import Path
from typing import Any

import pytest

from tests.ground.images import MIB, Chain, create, run
from tests.ground.machines import Machine, machine
from tests.ground.qemu import QEMU
from tests.guest.initramfs import Parts, initramfs

SLOTS = 256
KERNEL = "quiet panic=-1 mitigations=off no_timer_check"
"""The last for a busy machine, where the guest's clocks are too late for the kernel's taste."""

INIT = Path(__file__).with_name("init.sh")
ACCEL = os.environ.get("QMPCOMMIT_TEST_ACCEL", "tcg")
"""``kvm`` where that works; a device file alone does not show it."""


def _missing() -> str | None:
    if QEMU.system is None:
        return "no qemu-system-x86_64"
    for program in ("mke2fs", "e2fsck", "debugfs"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"no {program} (Debian's e2fsprogs)"
    parts = Parts.found()
    return parts if isinstance(parts, str) else None


MISSING = _missing()
needs_guest = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """One of e2fsprogs' programs, which may lie where only root looks."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    program = shutil.which(name, path=path) or name
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def file_system(
    folder: Path, size: int = 64 * MIB, names: tuple[str, str] = ("base", "top")
) -> Chain:
    """``base.qcow2`` with an empty ext4 and an empty overlay ``top.qcow2`` over it."""
    raw = folder / "fs.raw"
    with raw.open("wb") as file:
        file.truncate(size)
    done = tool("mke2fs", "-q", "-F", "-t", "ext4", raw)
    assert done.returncode == 0, done.stderr
    base, top = [folder / f"{name}.qcow2" for name in names]
    run(QEMU.img, "convert", "-f", "raw", "-O", "qcow2", raw, base)
    raw.unlink()
    return Chain([base, create(top, None, backing=base)], [])


@dataclass
class Guest:
    """A guest that has mounted its disks; `acked` is what it said of each slot, last word.

    It writes to its `disks` in turn, one file after the other; `written` are all that it has
    acknowledged since it booted.
    """

    qemu: Machine
    agent: str
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    acked: dict[int, tuple[int, str]] = field(default_factory=dict)
    count: int = 0
    disks: int = 1
    written: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of the acknowledgements, our clock
    said: list[str] = field(default_factory=list)
    _spins: int = 0
    _boots: int = 0
    _seen: int = 0
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)
    _listening: asyncio.Task[None] | None = None

    async def _listen(self) -> None:
        while line := await self.reader.readline():
            match line.decode().split():
                case ["ack", number, digest]:
                    assert int(number) == self.count
                    self.acked[self.count % SLOTS] = self.count, digest
                    self.written.append(digest)
                    self.count += 1
                    self.times.append(asyncio.get_running_loop().time())
                case ["ready"]:  # once more: it was reset
                    self.acked, self.written, self.count = {}, [], 0
                    self._boots += 1
                    self.said = []
                case words:
                    self.said.append(" ".join(words))
            async with self._news:
                self._news.notify_all()
        async with self._news:
            self.said.append("gone")
            self._news.notify_all()

    def order(self, what: str) -> None:
        """Tell the guest's script one of its orders: ``write``, ``agent``, ``count N``, ..."""
        self.writer.write(f"{what}\n".encode())

    async def says(self, what: str) -> None:
        """Wait for a line of the guest's."""
        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: what in self.said or self._over())
        assert what in self.said, f"the guest said {self.said}, not {what}"

    async def boots(self) -> None:
        """Wait until it has come up again, having been reset; it has said nothing since then."""
        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: self._boots > self._seen or self._over())
        assert not self._over(), f"the guest said {self.said}"
        self._seen = self._boots

    async def spin(self) -> None:
        """Wait while the guest's CPU does as much work as 20 writes, without the disk."""
        self._spins += 1
        self.order(f"spin {self._spins}")
        await self.says(f"spun {self._spins}")

    async def counts(self, number: int) -> None:
        """Have it write this to a file ``count``, and wait until that is on all its disks."""
        self.order(f"count {number}")
        await self.says(f"counted {number}")

    async def more(self, writes: int = 10) -> None:
        """Wait until it has synced and acknowledged so many more writes."""
        wanted = self.count + writes
        async with asyncio.timeout(60), self._news:
            await self._news.wait_for(lambda: self.count >= wanted or self._over())
        assert self.count >= wanted, f"the guest wrote {self.count} files and said {self.said}"

    def _over(self) -> bool:
        return any(word.startswith(("failed", "gone")) for word in self.said)

    async def power_off(self) -> None:
        """End the writes, unmount and power off; QEMU ends."""
        self.order("stop")
        await self.says("unmounted")
        await self.qemu.ended()
        await self.says("gone")


def names_in(devices: Sequence[str]) -> list[str]:
    """What the guest's kernel calls its disks: ``vda``, or ``sda`` on a SCSI controller."""
    kinds = ["sd" if device == "scsi-hd" else "vd" for device in devices]
    return [kind + "abcdefgh"[kinds[:number].count(kind)] for number, kind in enumerate(kinds)]


@asynccontextmanager
async def guest(
    folder: Path, *chains: Chain, reboots: bool = False, **options: Any
) -> AsyncIterator[Guest]:
    """A guest, booted and writing; one that `reboots` when it is reset, or whose QEMU ends then.

    `options` are those of `machine`.
    """
    parts = Parts.found()
    assert isinstance(parts, Parts)
    script, image = INIT.read_text(), folder / "initramfs"
    image.write_bytes(await asyncio.to_thread(initramfs, parts, script, agent=True))
    console, agent = folder / "console", folder / "agent"
    device = options.get("device", "virtio-blk-pci")
    disks = names_in([device] * len(chains) if isinstance(device, str) else device)
    extra = [
        *([] if reboots else ["-no-reboot"]),
        "-machine", f"accel={ACCEL}", "-m", "256",
        "-kernel", str(parts.kernel), "-initrd", str(image),
        "-append", f"console=ttyS0 {KERNEL} disks={','.join(disks)}",
        "-serial", f"file:{folder / 'kernel.log'}",
        "-chardev", f"socket,id=console,path={console},server=on,wait=off",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=agent,path={agent},server=on,wait=off",
        "-device", "virtio-serial-pci",
        "-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
    ]  # fmt: skip
    async with machine(folder, *chains, extra=extra, **options) as qemu:
        await qemu.execute("query-status")  # once it answers, its console is there
        reader, writer = await asyncio.open_unix_connection(str(console))
        made = Guest(qemu, str(agent), reader, writer, disks=len(chains))
        made._listening = asyncio.create_task(made._listen())
        try:
            await qemu.execute("cont")
            await made.boots()
            made.order("write")
            await made.more(5)
            yield made
        except BaseException:
            log = folder / "kernel.log"
            print(log.read_text(errors="replace")[-3000:] if log.exists() else "no kernel log")
            raise
        finally:
            made._listening.cancel()
            await asyncio.wait({made._listening})
            writer.close()


def assert_files(active: Path, made: Guest, *, clean: bool = True, disk: int = 0) -> None:
    """The file system of this image checks clean and holds every acknowledged write to that disk.

    One that was cut off (not `clean`) replays its journal first; the write that was then under
    way may be there or not.
    """
    found = digests(active, clean=clean)
    acked = {slot: said for slot, said in made.acked.items() if slot % made.disks == disk}
    assert acked
    for slot, (number, digest) in acked.items():
        if not clean and slot == made.count % SLOTS:
            continue  # the next write to this slot was under way
        assert found.get(slot) == digest, f"write {number} was acknowledged; not in {active.name}"


def assert_kept(base: Path, made: Guest, before: int, *, disk: int) -> None:
    """A base that stands still is a sound file system, with the writes that a keep came after.

    Those of the first `before` that the guest has not begun to overwrite meanwhile.
    """
    found = digests(base, clean=False)
    since = max(0, made.count - SLOTS + 1)
    numbers = [number for number in range(since, before) if number % made.disks == disk]
    assert numbers
    for number in numbers:
        digest = made.written[number]
        assert found.get(number % SLOTS) == digest, f"{base.name} lacks write {number}"


def assert_one_instant(images: Sequence[Path], made: Guest) -> int:
    """These images of all its disks are what a power cut leaves; the number of the last write.

    All writes up to that one are there, on whichever disk, for each began after the one before it
    was acknowledged; and none after it.
    """
    number_of = {digest: number for number, digest in enumerate(made.written)}
    found: set[int] = set()
    for disk, image in enumerate(images):
        for slot, digest in digests(image, clean=False).items():
            if slot % made.disks == disk and digest in number_of:
                found.add(number_of[digest])
    assert found
    last = max(found)
    missing = set(range(max(0, last - SLOTS + 1), last + 1)) - found
    assert not missing, f"write {last} is there, and of those before it not {sorted(missing)}"
    return last


def digests(image: Path, *, clean: bool) -> dict[int, str]:
    """What each slot's file holds in this image, whose file system has no faults."""
    folder = image.parent
    raw, files = folder / "checked.raw", folder / "files"
    run(QEMU.img, "convert", "-U", "-O", "raw", image, raw)
    if not clean:
        done = tool("e2fsck", "-p", raw)
        assert done.returncode in (0, 1), f"the journal is not replayed: {done.stdout}"
    done = tool("e2fsck", "-fn", raw)
    assert done.returncode == 0, f"the file system is damaged: {done.stdout}"
    files.mkdir()
    tool("debugfs", "-R", f"rdump / {files}", raw)
    found = {int(p.name): md5(p.read_bytes()).hexdigest() for p in files.glob("[0-9]*")}
    raw.unlink()
    shutil.rmtree(files)
    return found


def count_in(image: Path, folder: Path) -> int:
    """What the file ``count`` of this image's file system holds, as a reboot would find it."""
    raw = folder / "count.raw"
    run(QEMU.img, "convert", "-U", "-O", "raw", image, raw)
    done = tool("e2fsck", "-p", raw)
    assert done.returncode in (0, 1), f"the journal is not replayed: {done.stdout}"
    told = tool("debugfs", "-R", "cat /count", raw).stdout
    raw.unlink()
    return int(told)


def journal_is_empty(active: Path) -> bool:
    """Whether the file system needs no replay of its journal before it can be trusted."""
    raw = active.parent / "journal.raw"
    run(QEMU.img, "convert", "-U", "-O", "raw", active, raw)
    told = tool("debugfs", "-R", "features", raw).stdout
    raw.unlink()
    assert "has_journal" in told
    return "needs_recovery" not in told
