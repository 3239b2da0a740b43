"""The daemon over a journal that has lost something: nothing is begun twice or left untold."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpcommit.qmp.process import process_identity
from tests.daemon.daemons import Daemon, daemon
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.machines import Machine, storage_daemon

FIXTURE = Path(__file__).parent.parent / "fixtures" / "journal_schema_3.sql"
HOLD = {"disk": "top", "policy": {"kind": "hold"}}


@asynccontextmanager
async def one_disk(
    folder: Path, config: str = "", **more: Any
) -> AsyncIterator[tuple[Daemon, Chain, Machine]]:
    chain = make_chain(folder, **more)
    async with (
        storage_daemon(folder, chain) as qemu,
        daemon(folder, f'{config}\n[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        yield d, chain, qemu
        await qemu.quit()


_READS = """
import sqlite3, sys
reads = sqlite3.connect(sys.argv[1], isolation_level=None)
reads.execute("BEGIN")
reads.execute("SELECT count(*) FROM commits").fetchone()
print("reads", flush=True)
sys.stdin.read()
"""


@contextmanager
def in_the_log(d: Daemon) -> Iterator[None]:
    """What is written meanwhile stays in SQLite's log, whenever the daemon empties that."""
    path = d.folder / "state" / "journal.db"
    command = [sys.executable, "-c", _READS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reads:
        assert reads.stdout is not None
        assert reads.stdout.readline() == b"reads\n"
        try:
            yield
        finally:
            reads.kill()  # else it would empty the log itself


async def started_again(d: Daemon) -> None:
    await d.start()
    await d.connected("web1")


async def pivoted(d: Daemon, commit: str) -> None:
    await d.until(commit, "ready")
    answer = await d.post(f"/v1/commits/{commit}/decision", {"action": "pivot"})
    assert answer.status == 202, answer.body
    assert (await d.end_of(commit))["outcome"]["action"] == "pivot"


@pytest.mark.parametrize("gone", ["log", "journal", "text"])
async def test_a_commit_that_was_lost_is_found_by_its_job(folder: Path, gone: str) -> None:
    async with one_disk(folder) as (d, chain, _):
        with in_the_log(d):
            commit = await d.commit("web1", **HOLD)
            await d.until(commit, "ready")
            await d.kill()
        state = folder / "state"
        journal = state / "journal.db"
        if gone == "text":
            with closing(sqlite3.connect(journal)) as whole:
                whole.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            text = bytearray(journal.read_bytes())
            text[text.rindex(b'"block-commit"') + 3] ^= 0x80
            journal.write_bytes(text)
        for path in state.glob("journal.db*" if gone == "journal" else "journal.db-*"):
            path.unlink()
        await started_again(d)
        (loss,) = (await d.get("/v1/losses")).json
        assert [named["id"] for named in loss["promises"]] == [commit]
        assert commit in d.log
        await pivoted(d, commit)
        assert await d.stop() == 0
        await started_again(d)  # said at the start that found it, and kept
        assert (await d.get("/readyz")).json["warnings"] == []
        assert (await d.get("/v1/losses")).json == [loss]
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_job_that_nothing_names_is_held_for_a_decision(folder: Path) -> None:
    """As where the journal alone is restored, or its roll is lost with it."""
    async with one_disk(folder) as (d, chain, _):
        with in_the_log(d):
            commit = await d.commit("web1", **HOLD)
            await d.until(commit, "ready")
            await d.kill()
        for name in ("journal.db-wal", "journal.db-shm", "journal.roll"):
            (folder / "state" / name).unlink()
        await started_again(d)
        (loss,) = (await d.get("/v1/losses")).json
        assert not loss["all_named"]
        (found,) = (await d.get("/v1/commits")).json
        assert found["request"]["policy"]["kind"] == "hold"
        assert found["id"] != commit
        await pivoted(d, found["id"])
    assert_disk(chain.base, chain.pictures[-1])


async def test_what_may_have_been_done_is_not_done_again(folder: Path) -> None:
    """An old journal says that it waits in the queue; it has been committed since."""
    limits = "[limits]\ncommits = 1"
    async with one_disk(folder, limits) as (d, chain, _):
        first = await d.commit("web1", **HOLD)
        waits = await d.commit("web1", disk="top", policy={"kind": "keep"}, override=["claim"])
        await d.until(first, "ready")
        old = folder / "old.db"
        own = sqlite3.connect(folder / "state" / "journal.db")
        with closing(own), closing(sqlite3.connect(old)) as to:
            own.backup(to)
        await d.post(f"/v1/commits/{first}/decision", {"action": "keep"})
        await d.end_of(first)
        await d.end_of(waits)
        await d.kill()
        for name in ("journal.db-wal", "journal.db-shm"):
            (folder / "state" / name).unlink()
        old.rename(folder / "state" / "journal.db")
        await started_again(d)
        (loss,) = (await d.get("/v1/losses")).json
        assert {named["id"] for named in loss["promises"]} == {first, waits}
        for commit in (first, waits):
            ended = await d.end_of(commit)
            assert ended["state"] in ("failed", "done"), ended
        said = (await d.get(f"/v1/commits/{waits}")).json["error"]["message"]
        assert "lost" in said
        assert "qmpcommit chain" in said
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_journal_of_the_version_before_is_taken_up(folder: Path) -> None:
    chain = make_chain(folder)
    job = "qmpcommit-top-9d34bae8"
    async with storage_daemon(folder, chain) as qemu:
        await qemu.execute(
            "block-commit",
            **{"job-id": job, "device": "top", "top-node": "top", "base-node": "base",
               "auto-dismiss": False},
        )  # fmt: skip
        text = FIXTURE.read_text().replace("@FOLDER@", str(folder))
        text = text.replace("@IDENTITY@", process_identity(qemu.pid))
        (folder / "state").mkdir()
        with closing(sqlite3.connect(folder / "state" / "journal.db")) as old:
            old.executescript(text)
        async with daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d:
            await d.connected("web1")
            assert (await d.get("/v1/losses")).json == []
            done, held = sorted((await d.get("/v1/commits")).json, key=lambda c: c["created"])
            assert (done["state"], done["outcome"]["action"]) == ("done", "keep")
            assert held["job_id"] == job
            assert {vm["name"] for vm in (await d.get("/v1/vms")).json} == {"web1", "web2"}
            await pivoted(d, held["id"])
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
