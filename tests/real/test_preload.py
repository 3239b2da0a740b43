"""A host that wants no import in its loop, and one that has only the card's three packages."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import storage_daemon

COMMITS = """
import asyncio, json, sys
import qmpcommit as qc
qc.preload()
before = set(sys.modules)

async def main():
    async with qc.Session.connect(sys.argv[1]) as vm:
        with vm.events() as events:
            job = await vm.commit("export0", policy=qc.Hold(), converge=qc.Converge(deadline=60))
            async for event in events:
                if isinstance(event, qc.events.BlockJobReady):
                    break
        await job.ready()
        await job.pivot()
        return (await job.wait()).action

action = asyncio.run(main())
print(json.dumps([action, sorted(set(sys.modules) - before)]))
"""

WITHOUT_EXTRAS = """
import sys
for name in ("click", "h11", "rich", "fastapi", "uvicorn"):
    sys.modules[name] = None
import qmpcommit as qc
qc.preload()
assert qc.Session and qc.client.DEFAULT_SOCKET
try:
    qc.Client
except ModuleNotFoundError as error:
    print(error)
"""


async def test_after_a_preload_a_commit_imports_nothing(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        command = [sys.executable, "-c", COMMITS, qemu.qmp]
        async with asyncio.timeout(60):
            run = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            said, _ = await run.communicate()
        assert json.loads(said) == ["pivot", []]
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


def test_the_library_needs_none_of_the_extras() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True, check=True
    )
    assert "the daemon's client needs the package h11: pip install 'qmpcommit[cli]'" in done.stdout
