"""A group over VMs with a ledger in a file, killed by SIGKILL at its n-th place.

There is a place before and after each QMP command that changes something, each note, and each file
that goes. Arguments: what to do as JSON (`vms`: the monitors, `policies`: of the one disk of each,
`freeze`; `meanwhile`: QMP commands on another monitor when the decision was noted, at which it dies
then), the ledger's file, the place's number (0: never), the file to which the places are
written as they are passed, and "resume" to go on with the group instead of beginning it. What it
comes to is written to ``outcome`` beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import qmpcommit as qc
from tests.ground.killing import places

WORK, LEDGER, DIE_AT, PLACES, HOW = sys.argv[1:]

HOLD_LIMIT = 60.0
"""Seconds: what is told apart here is where it dies, not how quick a busy machine is."""

UNLINK, NOTE = os.unlink, qc.FileLedger.note
place = places(PLACES, int(DIE_AT))


def unlink(name: Any, **more: Any) -> None:
    """``os.unlink`` with places."""
    place("before unlink")
    UNLINK(name, **more)
    place("after unlink")


async def note(self: qc.FileLedger, step: str, *arguments: Any, **facts: Any) -> None:
    """A note with places."""
    place(f"before note {step}")
    await NOTE(self, step, *arguments, **facts)
    place(f"after note {step}")
    if step == "finalize" and json.loads(WORK).get("meanwhile"):
        meanwhile(*json.loads(WORK)["meanwhile"])
        os.kill(os.getpid(), signal.SIGKILL)


def meanwhile(monitor: str, *commands: str) -> None:
    """What another client does to the job of one VM, before this process hears of anything."""
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(monitor)
        lines = other.makefile("rw")

        def ask(command: str, **arguments: str) -> Any:
            lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            lines.flush()
            for line in lines:
                answer = json.loads(line)
                if answer.keys() & {"return", "error"}:
                    return answer.get("return")
            raise EOFError

        ask("qmp_capabilities")
        (job,) = ask("query-jobs")
        for command in commands:
            while ask(command, id=job["id"]) is None:
                pass


async def main() -> None:
    """Begin it or go on with it, to its end."""
    ledger, work = qc.FileLedger(LEDGER), json.loads(WORK)
    async with AsyncExitStack() as stack:
        vms = [await stack.enter_async_context(qc.Session.connect(each)) for each in work["vms"]]
        if HOW == "resume":
            outcome: Any = await qc.resume(ledger, vms)
        else:
            members = [
                (vm, "vda", policy, {"delete": policy["kind"] in ("pivot", "recycle")})
                for vm, policy in zip(vms, work["policies"], strict=True)
            ]
            outcome = await qc.commit_group(
                members, ledger=ledger, freeze=work["freeze"], hold_limit=HOLD_LIMIT
            )
    Path(PLACES).with_name("outcome").write_text(outcome.model_dump_json())


os.unlink = unlink  # type: ignore[assignment]
qc.FileLedger.note = note  # type: ignore[method-assign]
asyncio.run(main())
