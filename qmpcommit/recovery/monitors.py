"""The monitors of this host: found by their sockets' names, and by the processes that serve them.

A QEMU that one may see tells on its command line on which sockets its monitors listen
(``-qmp unix:PATH``, ``-chardev socket`` with ``-mon``, ``--monitor`` of a storage daemon).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from glob import glob
from typing import NamedTuple, TypeVar

from qmpcommit.block.command_line import read_command_line
from qmpcommit.commit.vm import VM
from qmpcommit.errors import ConnectError, DeadlineExceeded, VMNotFound
from qmpcommit.names import SOCKETS
from qmpcommit.qmp.address import is_socket
from qmpcommit.qmp.bound import file_of

T = TypeVar("T")

WITHIN = 2.0
"""Seconds that one VM has to answer all that it is asked."""


class Place(NamedTuple):
    """One VM's monitors, each by its address: the first one that answers is asked.

    `why` is why none of them can be reached from here, "" where they may be.
    """

    addresses: tuple[str, ...]
    why: str = ""


class Served(NamedTuple):
    """What the processes of this host listen on: monitors, a tuple a VM, and other sockets.

    `lost` are VMs whose monitors have names that lead nowhere from here.
    """

    vms: tuple[tuple[str, ...], ...]
    others: frozenset[str]
    lost: tuple[Place, ...] = ()


def served() -> Served:
    """Of the processes that one may see; by their real paths, and only what is there."""
    vms: dict[str, tuple[str, ...]] = {}
    others: set[str] = set()
    lost: list[Place] = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        line = read_command_line(int(pid))
        if line is None or not line.monitors:
            continue
        try:
            cwd = os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            cwd = "/"  # absolute names are right from there too
        found, rest = (
            tuple(path for name in names if is_socket(path := _path(int(pid), cwd, name)))
            for names in (line.monitors, line.sockets)
        )
        gone = () if found else _unreachable(int(pid), line.monitors)
        if gone:
            where = f"{', '.join(gone)} (process {pid})"
            lost.append(Place((where,), _WHY.format(pid=pid, names=", ".join(gone))))
        if found:
            vms.setdefault(found[0], found)  # a wrapper has the same words as what it runs
        others.update(rest)
    return Served(tuple(vms.values()), frozenset(others), tuple(lost))


_WHY = (
    "QEMU (process {pid}) was started with the relative name {names} for its monitor and has left"
    " the folder from which that counts, as with -daemonize. Give the socket's path, as in:"
    " qmpcommit vms /vms/web1/qmp.sock; and start the VM with -qmp unix:$PWD/qmp.sock the next time"
)


def _path(pid: int, cwd: str, name: str) -> str:
    """Where a socket is from here that a process was given."""
    path = _real(os.path.join(cwd, name))
    if os.path.isabs(name) or is_socket(path):
        return path
    return _real(file_of(pid, name) or path)


def _unreachable(pid: int, names: Iterable[str]) -> tuple[str, ...]:
    """Of these relative names those on which that very process listens; a wrapper does not."""
    return tuple(name for name in names if not os.path.isabs(name) and file_of(pid, name) == "")


def others_of(address: str) -> list[str]:
    """The further monitors of the QEMU that serves this one, as far as one may see its process."""
    real = _real(address.removeprefix("unix:"))
    mine = next((vm for vm in served().vms if real in vm), ())
    return [path for path in mine if path != real]


def find(globs: Sequence[str] = ()) -> list[Place]:
    """The VMs whose monitors these globs name, or where there are none all of this host.

    A glob may be ``tcp:HOST:PORT`` too. Raises `VMNotFound` for one that names no socket. Looks
    at processes and folders.
    """
    known = served()
    if globs:
        return _grouped([path for pattern in globs for path in _named(pattern)], known)
    usual = [path for path in sorted(glob(SOCKETS)) if is_socket(path)]
    there = [path for path in usual if _real(path) not in known.others]
    found = _grouped([*there, *(path for vm in sorted(known.vms) for path in vm)], known)
    return [*found, *known.lost]


def _named(pattern: str) -> list[str]:
    if pattern.startswith("tcp:"):
        return [pattern]
    found = [path for path in sorted(glob(pattern.removeprefix("unix:"))) if is_socket(path)]
    if not found:
        raise VMNotFound(
            f"no monitor was found: there is no socket {pattern}. Start the VM with -qmp"
            " unix:PATH,server=on,wait=off, or correct the name"
        )
    return found


def _grouped(paths: Iterable[str], known: Served) -> list[Place]:
    """Those of one process are one VM's; what is named first is asked first."""
    of = {path: vm for vm in known.vms for path in vm}
    groups: dict[tuple[str, ...] | str, dict[str, str]] = {}
    for path in paths:
        real = path if path.startswith("tcp:") else _real(path)
        groups.setdefault(of.get(real, real), {}).setdefault(real, path)
    return [Place(tuple(group.values())) for group in groups.values()]


def _real(path: str) -> str:
    return os.path.realpath(path)


async def ask(
    place: Place, work: Callable[[VM], Awaitable[T]], *, within: float = WITHIN
) -> tuple[str, T]:
    """What one VM answers to `work`, and on which monitor; nothing takes longer than `within`.

    Where one monitor is busy the next one is asked. Raises `ConnectError`, or its `MonitorBusy`,
    where none greets, `DeadlineExceeded` where one greets and does not answer in time, and what
    `Monitor.execute` raises.
    """
    if place.why:
        raise ConnectError(place.why, vm=place.addresses[0])
    missing: ConnectError | None = None
    try:
        async with asyncio.timeout(within):
            for address in place.addresses:
                greeting = 0.9 * within / len(place.addresses)  # so that why is known in time
                vm = VM.connect(address, timeout=greeting, command_timeout=within)
                try:
                    await vm.open()
                except ConnectError as error:
                    missing = missing or error
                    continue
                try:
                    return address, await work(vm)
                finally:
                    await vm.close()
    except DeadlineExceeded:
        raise
    except TimeoutError:
        pass
    if missing is not None:
        raise missing
    where = place.addresses[0]
    raise DeadlineExceeded(
        f"{where} did not answer within {within:g} s: QEMU hangs, or it is busy", vm=where
    )
