"""What a person reads: names that would order the terminal about, output that can't be written."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.cli.command import COMMAND, ENVIRONMENT, run
from tests.ground.images import make_chain
from tests.ground.machines import machine

NAME = "a\x1b]0;lie\x07\x1b[31m\x7f\x9b\nb.qcow2"
SHOWN = r"a\x1b]0;lie\x07\x1b[31m\x7f\x9b\nb.qcow2"


async def test_a_name_gives_the_terminal_no_order_and_a_full_disk_is_told(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        laid = await run("snapshot", qemu.qmp, "vda", "--overlay", folder / NAME)
        assert (laid.status, SHOWN in laid.out) == (0, True), laid.err
        for words in (["chain", qemu.qmp], ["commit", qemu.qmp, "vda", "--pivot", "--dry-run"]):
            said = await run(*words)
            assert SHOWN in said.out
            assert not set(said.out + said.err) & set("\x1b\x07\x7f\x9b")
        said = await run("chain", qemu.qmp, "--json")
        assert said.json["disks"][0]["chain"][0]["filename"] == str(folder / NAME)
        said = await run("commit", qemu.qmp, f"no{NAME}", "--pivot")
        assert said.status == 4
        assert r"no" + SHOWN.split(r"\n", maxsplit=1)[0] in said.err
        assert not set(said.err) & set("\x1b\x07\x7f\x9b")
        for command in ("jobs", "vms"):
            with open("/dev/full", "wb") as full:
                process = await asyncio.create_subprocess_exec(
                    *COMMAND, command, qemu.qmp, "--watch", "--timeout", "20",
                    stdout=full, stderr=asyncio.subprocess.PIPE, env=ENVIRONMENT,
                )  # fmt: skip
                _, err = await asyncio.wait_for(process.communicate(), 30)
            assert (process.returncode, b"No space left" in err) == (1, True), (command, err)
        watch = [*COMMAND, "jobs", qemu.qmp, "--watch", "--timeout", "20"]
        shell = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *watch]
        process = await asyncio.create_subprocess_exec(
            *shell, stderr=asyncio.subprocess.PIPE, env=ENVIRONMENT
        )
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, err) == (1, b"")
        await qemu.quit()
