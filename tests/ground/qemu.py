"""Which QEMU's programs the tests run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def version(self) -> tuple[int, ...]:
        """``(7, 2, 22)``, as its qemu-img tells it."""
        done = subprocess.run([self.img, "--version"], capture_output=True, text=True, check=True)
        found = re.search(r"version (\d+(?:\.\d+)+)", done.stdout)
        assert found, done.stdout
        return tuple(int(part) for part in found[1].split("."))

    @property
    def clients_of_an_export(self) -> int:
        """How many NBD clients may write to one disk while its jobs end.

        The storage daemon of QEMU 5.2 dies of a segmentation fault where there are two.
        """
        return 1 if self.version < (6,) else 2


def _chosen() -> Qemu:
    folder = os.environ.get("QMPCOMMIT_TEST_QEMU_FOLDER")
    suffix = os.environ.get("QMPCOMMIT_TEST_QEMU_SUFFIX", "")
    return Qemu.installed(Path(folder) if folder else None, suffix)


QEMU = _chosen()
"""The QEMU of this test run."""
