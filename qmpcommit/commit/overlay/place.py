"""Where the file of a fresh overlay is that nobody has named in full."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from qmpcommit.block.chain import absolute, is_temporary
from qmpcommit.commit.overlay.file import is_device
from qmpcommit.commit.plan import Plan
from qmpcommit.errors import ChainError, InvalidRequest

Why = Literal["cycle", "snapshot"]
"""What a fresh overlay begins, as its name tells."""

_FORMER = re.compile(r"\.(?:cycle|snapshot)-\d{8}T\d{6}Z-[0-9a-f]{8}$")


def overlay_files(
    plans: Sequence[tuple[str, str | None, Plan]],
    given: str | os.PathLike[str] | None,
    why: Why = "cycle",
) -> list[str]:
    """The next overlays' files: as given, in the folder given, or beside the former ones.

    `plans` are with their VMs' names and QEMUs' working directories. Raises `ChainError` where a
    former overlay's folder is no place, `InvalidRequest` where several would get one file.
    """
    files = []
    for vm, cwd, plan in plans:
        path = absolute(plan.top, cwd)
        if not given:
            check_place(vm, plan, path)
        place = os.path.join(cwd or "", given or os.path.dirname(path))
        if not given or os.path.isdir(os.path.join(cwd or os.getcwd(), place)):
            files.append(new_overlay(place, path, why))
        elif len(plans) == 1:
            files.append(place)
        else:
            raise InvalidRequest(
                f"{place} is no folder, and each of {len(plans)} disks needs an overlay of its"
                " own. Nothing was changed"
            )
    return files


_NAMES = "--overlay FILE and the daemon's overlay_dir name it"


def check_place(vm: str, plan: Plan, path: str) -> None:
    """Raise `ChainError` where the former overlay's folder is no place for the next one."""
    if is_device(path):
        raise ChainError(
            f"{plan.disk} of {vm} is the block device {path}, and its next overlay would be laid"
            " beside it, into the host's memory: name a file or a folder for it. Nothing was"
            " changed",
            hint=_NAMES,
            vm=vm,
            disk=plan.disk.name,
        )
    if is_temporary(plan.top):
        raise ChainError(
            f"{plan.disk} of {vm} was started with snapshot=on, and its next overlay would stay"
            f" beside {path}, a temporary file of QEMU's own: name a file or a folder for it."
            " Nothing was changed",
            hint=_NAMES,
            vm=vm,
            disk=plan.disk.name,
        )


def new_overlay(folder: str, former: str, why: Why = "cycle") -> str:
    """The file of the next overlay: called as the former one, with the time and a number."""
    stem = _FORMER.sub("", os.path.basename(former).removesuffix(".qcow2"))
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return os.path.join(folder, f"{stem}.{why}-{stamp}-{os.urandom(4).hex()}.qcow2")
