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

T = TypeVar("T")

WITHIN = 2.0
"""Seconds that one VM has to answer all that it is asked."""


class Place(NamedTuple):
    """One VM's monitors, each by its address: the first one that answers is asked."""

    addresses: tuple[str, ...]


class Served(NamedTuple):
    """What the processes of this host listen on: monitors, a tuple a VM, and other sockets."""

    vms: tuple[tuple[str, ...], ...]
    others: frozenset[str]


def served() -> Served:
    """Of the processes that one may see; by their real paths, and only what is there."""
    vms: dict[str, tuple[str, ...]] = {}
    others: set[str] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        line = read_command_line(int(pid))
        if line is None or not line.monitors:
            continue
        try:
            cwd = os.readlink(f"/proc/{pid}/cwd")
        except OSError:
            cwd = "/"  # absolute names are right from there too
        found, rest = (
            tuple(path for name in names if is_socket(path := _real(os.path.join(cwd, name))))
            for names in (line.monitors, line.sockets)
        )
        if found:
            vms.setdefault(found[0], found)  # a wrapper has the same words as what it runs
        others.update(rest)
    return Served(tuple(vms.values()), frozenset(others))


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
    return _grouped([*there, *(path for vm in sorted(known.vms) for path in vm)], known)


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
