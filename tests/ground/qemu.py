"""Which QEMU's programs the tests run."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Qemu:
    """The programs of one QEMU; `system` and `daemon` may be missing."""

    name: str
    system: str | None
    daemon: str | None
    img: str
    io: str

    @classmethod
    def installed(cls, folder: Path | None = None, suffix: str = "") -> Qemu:
        """Those on the path, or those of a folder whose names end in `suffix`."""

        def find(program: str) -> str | None:
            return shutil.which(program + suffix, path=str(folder) if folder else None)

        return cls(
            name=suffix.lstrip("-") or "system",
            system=find("qemu-system-x86_64"),
            daemon=find("qemu-storage-daemon"),
            img=find("qemu-img") or "qemu-img",
            io=find("qemu-io") or "qemu-io",
        )


def _chosen() -> Qemu:
    folder = os.environ.get("QMPCOMMIT_TEST_QEMU_FOLDER")
    suffix = os.environ.get("QMPCOMMIT_TEST_QEMU_SUFFIX", "")
    return Qemu.installed(Path(folder) if folder else None, suffix)


QEMU = _chosen()
"""The QEMU of this test run."""
