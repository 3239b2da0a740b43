"""Bring the long chains of a running VM down to a few layers, one safe step after the other.

    python examples/flatten_chain.py QMP LAYERS [DISK ...]

Without DISK, of all disks. Layers are merged from the bottom up, and the files that were merged
away are deleted. It may be stopped at any time and run again: after each step a chain is valid.
"""

from __future__ import annotations

import asyncio
import sys

import qmpcommit as qc


async def main(qmp: str, layers: str, *names: str) -> None:
    """One disk after the other."""
    keep = int(layers)
    async with qc.Session.connect(qmp) as vm:
        disks = [await vm.disk(name) for name in names] if names else await vm.disks()
        for disk in disks:
            if len(disk.chain) <= keep:
                print(f"{disk.name}: has {len(disk.chain)} layers, left alone")
                continue
            async for outcome in vm.flatten(disk.name, keep=keep, delete=True):
                print(f"{disk.name}: {outcome.top.filename} merged into {outcome.base.filename}")
                for warning in outcome.warnings:
                    print(f"{disk.name}: {warning}")
        for disk in await vm.disks():
            print(" <- ".join(image.filename for image in reversed(disk.chain)))


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[2].isdigit():
        sys.exit(__doc__)
    try:
        asyncio.run(main(*sys.argv[1:]))
    except qc.QmpCommitError as error:
        sys.exit(f"{type(error).__name__}: {error.message}")
