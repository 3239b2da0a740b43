"""A storage daemon with many disks, each exported over NBD."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from tests.ground.images import Chain
from tests.ground.machines import Machine, _running, node_options
from tests.ground.qemu import QEMU, Qemu


@asynccontextmanager
async def many_disks(
    folder: Path,
    *chains: Chain,
    nodes: Sequence[str] = (),
    late: Sequence[str] = (),
    exports: bool = True,
    qemu: Qemu = QEMU,
) -> AsyncIterator[Machine]:
    """A ``qemu-storage-daemon`` whose disks are called as their chains' active layers.

    Each is an NBD export of that name at `Machine.nbd`. `nodes` are more ``--blockdev`` options
    (and ``--object``) before the chains, `late` are options after the NBD server.
    """
    assert qemu.daemon, "no qemu-storage-daemon"
    folder.mkdir(exist_ok=True)
    qmp, qmp2, nbd = folder / "qmp", folder / "qmp2", folder / "nbd"
    command = [qemu.daemon]
    for number, path in enumerate((qmp, qmp2)):
        command += ["--chardev", f"socket,id=c{number},path={path},server=on,wait=off"]
        command += ["--monitor", f"chardev=c{number}"]
    command += nodes
    for chain in chains:
        for options in node_options(chain):
            command += ["--blockdev", options]
    sockets = [qmp, qmp2]
    if exports:
        command += ["--nbd-server", f"addr.type=unix,addr.path={nbd},max-connections=100"]
        for number, chain in enumerate(chains):
            name = chain.top.stem
            command += ["--export", f"nbd,id=export{number},node-name={name},writable=on"]
        command += late
        sockets.append(nbd)
    async with _running(command, folder, sockets) as made:
        made.qmp2, made.nbd = str(qmp2), str(nbd)
        yield made
