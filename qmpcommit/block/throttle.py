"""Holding back what a guest writes to one disk, and putting the former limits back exactly.

The valve is the disk's own throttle filter, else its device's I/O limits, whichever its set-up
allows (``qom-set`` of a ``throttle-group``, or ``block_set_io_throttle``).

While it is held a ``throttle-group`` that nothing uses has the former limits, and a name that tells
the valve (``object-add``): whoever finds it after a death puts them back.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from qmpcommit.block.chain import Disk
from qmpcommit.block.graph import BlockGraph
from qmpcommit.errors import CommandRefused, CommitFailed
from qmpcommit.names import FORMER_LIMITS, HELD_GROUP
from qmpcommit.qmp.monitor import Monitor

MIB = 1 << 20

RESTORE_TRIES = 3
"""How often the former limits are put back while the monitor goes and comes."""

_KINDS = tuple(f"{unit}-{way}" for unit in ("bps", "iops") for way in ("total", "read", "write"))
NO_LIMITS: Mapping[str, int] = {
    **dict.fromkeys(_KINDS, 0),
    **{f"{kind}-max": 0 for kind in _KINDS},
    **{f"{kind}-max-length": 1 for kind in _KINDS},
    "iops-size": 0,
}
"""QEMU's ThrottleLimits that hold nothing back."""


_FORMER = re.compile(rf"{FORMER_LIMITS}([fqd])\.((?:[0-9a-f]{{2}})+)(?:\.((?:[0-9a-f]{{2}})+))?")


class Noted(NamedTuple):
    """What the name of a note of former limits tells: their valve, and its group if it had one.

    `kind` is "f" for the throttle group of a filter, "q" and "d" for a device by its qdev path or
    its drive; `name` is that.
    """

    kind: str
    name: str
    group: str = ""

    @property
    def id(self) -> str:
        """The note's name: names of people's have letters that no object of QEMU's may have."""
        coded = [word.encode().hex() for word in (self.name, self.group) if word]
        return f"{FORMER_LIMITS}{'.'.join((self.kind, *coded))}"

    @staticmethod
    def read(name: str) -> Noted | None:
        """What an object's name tells; None where it is no note."""
        match = _FORMER.fullmatch(name)
        with suppress(UnicodeDecodeError):
            if match is not None:
                kind, *words = match.groups()
                return Noted(kind, *(bytes.fromhex(word or "").decode() for word in words))
        return None

    def is_of(self, disk: Disk, graph: BlockGraph) -> bool:
        """Whether the valve is that of this disk."""
        if self.kind == "f":
            return self.name in _own_groups(disk, graph)
        return self.name == (disk.qdev if self.kind == "q" else disk.device)

    @property
    def message(self) -> str:
        """The valve, for people to read."""
        return f"{'throttle group' if self.kind == 'f' else 'device'} {self.name}"


def _device_name(name: str) -> str:
    """A member of ThrottleLimits as ``query-block`` and ``block_set_io_throttle`` call it."""
    name = name.replace("-total", "").replace("-read", "_rd").replace("-write", "_wr")
    return name.replace("-", "_")


DEVICE_NAMES = {_device_name(name): name for name in NO_LIMITS}


def write_limits(former: Mapping[str, int], rate: int) -> dict[str, int]:
    """The former limits with the writes held to `rate` bytes per second, or less if they were.

    QEMU takes a limit of the total and one of the writes only one at a time: a former total is
    divided between reads and writes.
    """
    limits = dict(former)
    total = former["bps-total"]
    if total and rate >= total:
        return limits
    if total:
        limits.update({"bps-total": 0, "bps-total-max": 0, "bps-total-max-length": 1})
        limits["bps-read"] = total - rate
    write = former["bps-write"]
    if write and write <= rate:
        return limits
    limits.update({"bps-write": rate, "bps-write-max": 0, "bps-write-max-length": 1})
    return limits


class Throttle(ABC):
    """What can hold the guest's writes to one disk; made by `find`.

    `limit` may be called often; `restore` puts back what `read` first found and is safe to
    repeat. All raise what `Monitor.execute` raises.
    """

    name: str

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.former: dict[str, Any] | None = None
        self._ours: list[dict[str, Any]] = []
        self._note = ""

    @staticmethod
    async def find(monitor: Monitor, disk: Disk, graph: BlockGraph) -> Throttle | None:
        """The disk's throttle filter with a group of its own, else its device, else None."""
        for group in _own_groups(disk, graph):
            throttle = FilterThrottle(monitor, group)
            with suppress(CommandRefused):  # a group that is no object of its own
                await throttle.read()
                return throttle
        if disk.qdev or disk.device:
            device = DeviceThrottle(monitor, disk)
            await device.read()
            return device
        return None

    async def read(self) -> dict[str, Any]:
        """The limits as they are; the first time, the former ones are remembered.

        Those are what a process has noted that was killed while it held the valve.
        """
        found = await self._read()
        if self.former is None:
            self.former = await self._noted() or found
            if self._note and found == self._held_by_the_dead(found, self.former):
                self._ours.append(found)
        return found

    def _held_by_the_dead(self, found: dict[str, Any], former: dict[str, Any]) -> dict[str, Any]:
        """What the limits found are, if it was a process of ours that set them last."""
        limits = self._limited(former, self._rate(found))
        group = str(found.get("group"))  # after a name of the disk that it may not have any more
        return {**limits, "group": group} if group.startswith(HELD_GROUP) else limits

    async def limit(self, bytes_per_second: int) -> None:
        """Hold the guest's writes to this rate; other limits stay as they were."""
        former = self.former if self.former is not None else await self.read()
        limits = self._limited(former, bytes_per_second)
        if not self._note:
            await self._take_down(former)
        if limits not in self._ours:
            self._ours.append(limits)  # before it is sent: its reply may be lost
        command, arguments = self._command(limits)
        await self.monitor.execute(command, arguments)

    async def restore(self) -> str:
        """Put the former limits back; returns "" once they were read back, else why not.

        Limits that are neither ours nor the former ones were set by somebody else meanwhile,
        and stay.
        """
        if self.former is None or not (self._ours or self._note):
            return ""
        present = await self._read()
        if present in self._ours:
            self.former = await self._of_group(self.former)
        if present != self.former:
            if present not in self._ours:
                await self._forget()
                return "somebody else has changed the limits meanwhile; they were left as they are"
            command, arguments = self._command(self.former)
            await self.monitor.execute(command, arguments)
            if await self._read() != self.former:
                return "QEMU took the former limits, and shows others"
        self._ours = []
        await self._forget()
        return ""

    async def _of_group(self, former: dict[str, Any]) -> dict[str, Any]:
        """The former limits, or those that others of their group have been given meanwhile."""
        return former

    async def _noted(self) -> dict[str, Any] | None:
        """The former limits, where a process has noted them that did not put them back."""
        for noted in await noted_limits(self.monitor):
            if noted._replace(group="") == self._valve:
                limits = await _limits_of(self.monitor, noted.id)
                self._note = noted.id
                return self._of_note(limits, noted.group)
        return None

    async def _take_down(self, former: dict[str, Any]) -> None:
        """Note the former limits in QEMU, before they are changed for the first time."""
        limits, group = self._to_note(former)
        name = self._valve._replace(group=group).id
        note = {"qom-type": "throttle-group", "id": name, "limits": limits}
        try:
            await self.monitor.execute("object-add", note)
        except CommandRefused as error:
            if await self._noted() is None:  # else only the reply to it was lost
                self.monitor.log.warning("limits_not_noted", error=error.desc)
                return
        self._note = name

    async def _forget(self) -> None:
        with suppress(CommandRefused):
            await self.monitor.execute("object-del", {"id": self._note})
        self._note = ""

    def repair(self) -> dict[str, Any] | None:
        """The QMP command that puts the former limits back; None where they are unknown."""
        if self.former is None:
            return None
        command, arguments = self._command(self.former)
        return {"execute": command, "arguments": arguments}

    @property
    @abstractmethod
    def _valve(self) -> Noted: ...

    @abstractmethod
    async def _read(self) -> dict[str, Any]: ...

    @abstractmethod
    def _limited(self, former: dict[str, Any], rate: int) -> dict[str, Any]: ...

    @abstractmethod
    def _rate(self, limits: dict[str, Any]) -> int: ...

    @abstractmethod
    def _to_note(self, limits: dict[str, Any]) -> tuple[dict[str, int], str]: ...

    @abstractmethod
    def _of_note(self, limits: dict[str, int], group: str) -> dict[str, Any]: ...

    @abstractmethod
    def _command(self, limits: dict[str, Any]) -> tuple[str, dict[str, Any]]: ...


class FilterThrottle(Throttle):
    """The ``throttle-group`` object of a throttle filter over the active layer."""

    def __init__(self, monitor: Monitor, group: str) -> None:
        super().__init__(monitor)
        self._group = group
        self.name = self._valve.message
        self._where = {"path": f"/objects/{group}", "property": "limits"}

    async def _read(self) -> dict[str, Any]:
        return await _limits_of(self.monitor, self._group)

    @property
    def _valve(self) -> Noted:
        return Noted("f", self._group)

    def _limited(self, former: dict[str, Any], rate: int) -> dict[str, Any]:
        return write_limits(former, rate)

    def _rate(self, limits: dict[str, Any]) -> int:
        return int(limits["bps-write"])

    def _to_note(self, limits: dict[str, Any]) -> tuple[dict[str, int], str]:
        return limits, ""

    def _of_note(self, limits: dict[str, int], group: str) -> dict[str, Any]:
        return limits

    def _command(self, limits: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "qom-set", {**self._where, "value": limits}


class DeviceThrottle(Throttle):
    """The I/O limits of a guest's device (``block_set_io_throttle``).

    While it is held the device is in a group of its own, so that others in its former group
    are not slowed with it.
    """

    def __init__(self, monitor: Monitor, disk: Disk) -> None:
        super().__init__(monitor)
        self.name = f"device {disk.name}"
        self._disk = disk
        self._device = {"id": disk.qdev} if disk.qdev else {"device": disk.device}

    async def _read(self) -> dict[str, Any]:
        by = "qdev" if self._disk.qdev else "device"  # a note of a dead process tells only one
        wanted = self._disk.qdev or self._disk.device
        for device in await self.monitor.execute("query-block"):
            if device.get(by) == wanted:
                found = device.get("inserted") or {}
                return {**_shown(found), **({"group": found["group"]} if "group" in found else {})}
        raise CommandRefused(
            f"{self._disk} of {self.monitor.name} is gone: query-block does not show it",
            vm=self.monitor.name,
            disk=self._disk.name,
            command="query-block",
            error_class="DeviceNotFound",
            desc="no such device",
        )

    async def _of_group(self, former: dict[str, Any]) -> dict[str, Any]:
        """Who joins a group brings it their limits: those that a member of it has now count."""
        group = former.get("group")
        for device in await self.monitor.execute("query-block") if group else ():
            member = device.get("inserted") or {}
            if member.get("group") == group:
                return {**_shown(member), "group": group}
        if group:
            with suppress(CommandRefused):  # an object, which throttle filters may be in
                limits = await _limits_of(self.monitor, str(group))
                return {**{n: limits[q] for n, q in DEVICE_NAMES.items()}, "group": group}
        return former

    def _limited(self, former: dict[str, Any], rate: int) -> dict[str, Any]:
        limits = write_limits({q: former[n] for n, q in DEVICE_NAMES.items()}, rate)
        mine = {n: limits[q] for n, q in DEVICE_NAMES.items()}
        return {**mine, "group": f"{HELD_GROUP}{self._disk.name}"}

    @property
    def _valve(self) -> Noted:
        return Noted("q", self._disk.qdev) if self._disk.qdev else Noted("d", self._disk.device)

    def _rate(self, limits: dict[str, Any]) -> int:
        return int(limits["bps_wr"])

    def _to_note(self, limits: dict[str, Any]) -> tuple[dict[str, int], str]:
        return {q: limits[n] for n, q in DEVICE_NAMES.items()}, str(limits.get("group") or "")

    def _of_note(self, limits: dict[str, int], group: str) -> dict[str, Any]:
        mine = {n: limits[q] for n, q in DEVICE_NAMES.items()}
        return {**mine, **({"group": group} if group else {})}

    def _command(self, limits: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "block_set_io_throttle", {**self._device, **limits}


def _shown(inserted: Mapping[str, Any]) -> dict[str, int]:
    """A device's limits, as ``query-block`` shows them."""
    return {n: int(inserted.get(n, NO_LIMITS[q])) for n, q in DEVICE_NAMES.items()}


async def _limits_of(monitor: Monitor, group: str) -> dict[str, int]:
    """A throttle group's ThrottleLimits with all its members."""
    where = {"path": f"/objects/{group}", "property": "limits"}
    found = await monitor.execute("qom-get", where)
    return {name: int(found.get(name, default)) for name, default in NO_LIMITS.items()}


def _own_groups(disk: Disk, graph: BlockGraph) -> list[str]:
    """The groups of the throttle filters that the guest's writes pass, and that only they use."""
    tops = [
        str((device.get("inserted") or {}).get("node-name"))
        for device in graph.devices
        if (disk.qdev or disk.device)
        and (str(device.get("qdev") or ""), str(device.get("device") or ""))
        == (disk.qdev, disk.device)
    ]
    tops += [str(e.get("node-name")) for e in graph.exports if e.get("id") in disk.exports]
    passed = [set(graph.filters(top)) for top in tops]
    mine = set[str].intersection(*passed) if passed else set()
    groups: dict[str, str | None] = {
        name: _group_of(node.raw) for name, node in graph.nodes.items() if node.driver == "throttle"
    }
    others = {group for name, group in groups.items() if name not in mine}
    others |= {(d.get("inserted") or {}).get("group") for d in graph.devices} - {None}
    if None in others:
        return []  # a filter that does not say its group could be in any
    return sorted({g for name, g in groups.items() if name in mine and g and g not in others})


def _group_of(raw: Mapping[str, Any]) -> str | None:
    """A throttle filter's group: QEMU tells it nowhere but in the node's ``json:`` file name."""
    text = str(raw.get("file") or "")
    with suppress(ValueError, AttributeError):
        return str(json.loads(text.removeprefix("json:")).get("throttle-group") or "") or None
    return None


def obstacle(disk: Disk) -> str:
    """Why nothing holds this disk's writes back, for people to read."""
    return (
        f"nothing can hold back the writes to {disk}: it is no guest's device and has no throttle"
        " filter with a throttle-group of its own above its active layer; export it through one"
        " (--object throttle-group,id=G --blockdev throttle,node-name=T,throttle-group=G,file=TOP)"
    )


# -- after a death --------------------------------------------------------------------------------


async def noted_limits(monitor: Monitor) -> list[Noted]:
    """The notes of former limits that are in this QEMU (``qom-list``)."""
    try:
        listed = await monitor.execute("qom-list", {"path": "/objects"})
    except CommandRefused:
        return []
    found = (Noted.read(str(each.get("name"))) for each in listed)
    return [each for each in found if each is not None]


async def put_back(monitor: Monitor, noted: Noted) -> str:
    """Put the limits back that a killed process has noted; what became of them, in words.

    Raises `CommitFailed` where QEMU does not take them, and what `Monitor.execute` raises.
    """
    throttle = _valve_of(monitor, noted)
    try:
        await throttle.read()
    except CommandRefused:
        with suppress(CommandRefused):
            await monitor.execute("object-del", {"id": noted.id})
        return f"{noted.message} is gone, and its limits with it"
    noted_then = throttle.former
    problem = await throttle.restore()
    if throttle._note:
        raise CommitFailed(problem)
    if not problem and throttle.former != noted_then:
        return f"it is in the throttle group {noted.group} again, with the limits that this has now"
    return problem or "the limits that it had before are back"


async def put_back_by(monitor: Monitor, repair: Mapping[str, Any]) -> bool:
    """`put_back` where a note tells the same as this command (`Throttle.repair`); whether one did.

    Limits that somebody has set since stay, which the command alone could not tell.
    """
    for noted in await noted_limits(monitor):
        throttle = _valve_of(monitor, noted)
        with suppress(CommandRefused):
            await throttle.read()
        if throttle.repair() == repair:
            await put_back(monitor, noted)
            return True
    return False


async def put_back_of(monitor: Monitor, disk: Disk, graph: BlockGraph) -> None:
    """`put_back` for what is noted of this disk; that it fails is only logged."""
    for noted in await noted_limits(monitor):
        if noted.is_of(disk, graph):
            try:
                monitor.log.info("limits_restored", what=await put_back(monitor, noted))
            except (CommandRefused, CommitFailed) as error:
                monitor.log.warning("limits_not_restored", why=error.message)


def _valve_of(monitor: Monitor, noted: Noted) -> Throttle:
    match noted.kind:
        case "f":
            return FilterThrottle(monitor, noted.name)
        case "q":
            return DeviceThrottle(monitor, Disk(noted.name, qdev=noted.name))
        case _:
            return DeviceThrottle(monitor, Disk(noted.name, device=noted.name))
