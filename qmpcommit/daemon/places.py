"""In which folders what is asked over the API may have a file used, made or deleted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal

from qmpcommit.block.chain import Disk, absolute
from qmpcommit.commit.plan import Plan
from qmpcommit.commit.policy import fresh_of
from qmpcommit.daemon.config import Access, Config
from qmpcommit.daemon.registry import VM, Registry
from qmpcommit.daemon.rights import ASKER
from qmpcommit.errors import InvalidRequest
from qmpcommit.qmp.address import Address
from qmpcommit.session import Session
from qmpcommit.wire.commit import CommitRequest

Kind = Literal["monitors", "agents", "overlays", "deletions"]

_CALLED: dict[Kind, str] = {
    "monitors": "a monitor",
    "agents": "a guest agent's socket",
    "overlays": "an overlay",
    "deletions": "a file that is deleted",
}


class Places:
    """The allow-lists of folders; where ``[access]`` is not given, all is allowed.

    The configuration's own cycles and rules are not asked: who wrote it may do all.
    """

    def __init__(self, config: Config) -> None:
        self._access: Access | None = config.access
        sockets = [Address.parse(vm.qmp).path for vm in config.vm]
        sockets += [rule.glob for rule in config.discover]
        self._near = [os.path.dirname(path) for path in sockets if path is not None]

    @property
    def _open(self) -> bool:
        return self._access is None or ASKER.get() is None

    def check(self, kind: Kind, *paths: str, beside: Iterable[str] = ()) -> None:
        """Raise `InvalidRequest` for one that is in no folder where it may be."""
        if self._open:
            return
        assert self._access is not None
        listed: Sequence[str] | None = getattr(self._access, kind)
        if listed is None:
            listed = [*beside] if kind in ("overlays", "deletions") else self._near
        for path in paths:
            place = Address.parse(path).path if kind == "monitors" else path
            if place is not None and not _is_within(place, listed):
                raise InvalidRequest(
                    f"{path} may not be {_CALLED[kind]}: it is in none of the folders that the"
                    f" daemon's configuration allows (access.{kind}:"
                    f" {', '.join(listed) or 'none'}). Nothing was sent"
                )
            if place is None and kind == "monitors" and path not in listed:
                raise InvalidRequest(
                    f"{path} may not be a monitor: the daemon's configuration does not list it"
                    " (access.monitors)"
                )

    def check_commit(self, vm: VM, session: Session, plan: Plan, request: CommitRequest) -> None:
        """Raise `InvalidRequest` where a commit would make, delete or rename a file elsewhere."""
        if self._open:
            return
        beside = _folders(vm, [plan.disk], session.cwd)
        overlays = [policy.overlay for policy in fresh_of(request.policy)]
        self.check("overlays", *overlays, beside=beside)
        if plan.stale != "leave":
            layers = (plan.top, *plan.between)
            files = [absolute(image, session.cwd) for image in layers]
            self.check("deletions", *files, beside=beside)

    async def check_overlay_dir(
        self, registry: Registry, vms: Iterable[str], folder: str | None
    ) -> None:
        """Raise `InvalidRequest` where a window's overlays may not be in that folder.

        None is the folder of each disk's active layer.
        """
        if self._open:
            return
        for name in dict.fromkeys(vms):
            vm = registry.vms.get(name)
            if vm is None:
                continue  # which is refused elsewhere
            async with registry.use(vm, wait=1.0) as session:
                disks = await session.disks()
            beside = _folders(vm, disks, session.cwd)
            active = [absolute(disk.active, session.cwd) for disk in disks if disk.active]
            made = active if folder is None else [os.path.join(folder, "overlay")]
            self.check("overlays", *made, beside=beside)


def _folders(vm: VM, disks: Iterable[Disk], cwd: str | None) -> list[str]:
    """Those of the layers of a VM that the configuration knows; what others name proves nothing."""
    if vm.origin == "api":
        return []
    return sorted({os.path.dirname(absolute(each, cwd)) for disk in disks for each in disk.chain})


def _is_within(path: str, folders: Iterable[str]) -> bool:
    """Whether a file is, by its real place, in one of these folders or below it."""
    if not os.path.isabs(path):
        return False
    folder = PurePosixPath(os.path.realpath(os.path.dirname(path)))
    return any(
        place.match(pattern) or str(place) == pattern
        for pattern in map(_real, folders)
        for place in (folder, *folder.parents)
    )


def _real(pattern: str) -> str:
    """A pattern whose beginning, which is no pattern, is a real path."""
    parts = PurePosixPath(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return str(PurePosixPath(os.path.realpath(PurePosixPath(*parts[:fixed])), *parts[fixed:]))
