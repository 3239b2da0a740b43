"""A journal that is damaged, cut off or without its log opens, and tells what it has lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qmpcommit.daemon import roll
from qmpcommit.daemon.journal import Journal, JournalError, Statement, event
from tests.ground.places import STRIDE

FIXTURE = Path(__file__).parent.parent / "fixtures" / "journal_schema_3.sql"
FILES = ("j.db", "j.db-wal", "j.db-shm", "j.roll")

WRITER = """
import asyncio, os, sys
from qmpcommit.daemon.journal import Journal, Statement, event
from tests.unit.test_journal_damage import made

async def main():
    journal = await Journal(sys.argv[1]).open()
    await made(journal)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


def commit(number: int, state: str = "running", **more: Any) -> Statement:
    named = {
        "id": f"{number:032x}", "vm": f"web{number}", "disk": "vda",
        "job_id": f"qmpcommit-{number}", "state": state, "created": 1.7e9 + number,
        "request": json.dumps({"disk": "vda", "policy": {"kind": "hold"}}), **more,
    }  # fmt: skip
    places = ", ".join("?" * len(named))
    sql = f"INSERT INTO commits ({', '.join(named)}) VALUES ({places})"
    return Statement(sql, tuple(named.values()))


def noted(number: int, step: str) -> Statement:
    text = json.dumps({"step": step, "state": {}, "fill": "x" * 300})
    return Statement("UPDATE commits SET noted = ? WHERE id = ?", (text, f"{number:032x}"))


async def made(journal: Journal) -> None:
    """What the journal of a busy host holds."""
    for number in range(8):
        await journal.write(
            commit(number), events=[event("commit", f"web{number}", f"{number:032x}", '{"a": 1}')]
        )
    await journal.write(Statement("INSERT INTO vms (name, spec) VALUES ('web9', '{}')"))
    sql = "INSERT INTO keys (key, fingerprint, commit_id, created) VALUES ('k', 'f', ?, 1.5)"
    await journal.write(Statement(sql, (f"{1:032x}",)))
    for number in range(8):
        await journal.write(noted(number, "block-commit"))
    ended = "UPDATE commits SET state = 'done', ended = 1.8e9, outcome = '{}' WHERE id = ?"
    for number in (0, 1, 2):
        await journal.write(Statement(ended, (f"{number:032x}",)))
    await journal.write(noted(5, "job-complete"))


OPEN = {f"{number:032x}" for number in (3, 4, 5, 6, 7)}
ALL = {f"{number:032x}" for number in range(8)}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a daemon that was killed: all four files."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, "-c", WRITER, folder / "j.db"], check=False)
    assert done.returncode == -9
    assert all((folder / name).stat().st_size for name in FILES)
    return folder


@pytest.fixture
def copied(killed: Path, folder: Path) -> Path:
    for name in FILES:
        shutil.copy(killed / name, folder / name)
    return folder


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Journal]:
    journal = await Journal(folder / "j.db").open()
    try:
        yield journal
    finally:
        await journal.close()


async def rows(journal: Journal) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in await journal.read("SELECT * FROM commits")}


async def test_a_killed_daemons_journal_is_sound(copied: Path) -> None:
    async with opened(copied) as journal:
        assert journal.loss is None
        assert {i for i, row in (await rows(journal)).items() if row["ended"] is None} == OPEN
    async with opened(copied) as journal:
        assert journal.loss is None


def told(journal: Journal) -> set[str]:
    assert journal.loss is not None
    return {lost.id for lost in journal.loss.promises}


async def check(folder: Path, what: str) -> str:
    """Open it: each promise is as it was, or it is told that it may not be; how it went."""
    async with opened(folder) as journal:
        found = await rows(journal)
        await journal.write(commit(99))
        if journal.loss is None:
            assert found.keys() == ALL, what
            for key in OPEN:
                assert found[key]["ended"] is None, what
                step = "job-complete" if key == f"{5:032x}" else "block-commit"
                assert json.loads(found[key]["noted"])["step"] == step, what
                assert found[key]["vm"] == f"web{int(key, 16)}", what
                assert json.loads(found[key]["request"])["disk"] == "vda", what
            return "sound"
        assert journal.set_aside is not None
        assert journal.set_aside.exists() or what.startswith("gone"), what
        for key in (OPEN - told(journal)) & found.keys():
            assert found[key]["vm"] == f"web{int(key, 16)}", what
            assert "lost" not in json.loads(found[key]["noted"]), what
            step = "job-complete" if key == f"{5:032x}" else "block-commit"
            assert json.loads(found[key]["noted"])["step"] == step, what
        assert told(journal) >= OPEN - found.keys() or not journal.loss.all_named, what
        for key in OPEN & told(journal) & found.keys():
            assert json.loads(found[key]["noted"])["lost"], what
        (loss,) = await journal.read("SELECT * FROM losses")
        assert loss["kept"] == str(journal.set_aside)
    async with opened(folder) as journal:  # told once, and nothing is lost by that
        assert journal.loss is None
        again = await rows(journal)
        assert again.keys() == found.keys() | {f"{99:032x}"}, what
    return "told"


def places(size: int, name: str) -> Iterator[int]:
    """Bytes to damage: the headers, and a sample of all others."""
    chance = random.Random(name)
    yield from range(0, min(size, 128), 1 if STRIDE == 1 else 9)
    yield from sorted(chance.sample(range(size), min(size, max(12, 240 // STRIDE))))


@pytest.mark.parametrize("name", FILES)
async def test_any_damaged_byte_is_survived_and_told(killed: Path, folder: Path, name: str) -> None:
    whole = (killed / name).read_bytes()
    said = {"sound": 0, "told": 0}
    for number, place in enumerate(places(len(whole), name)):
        at = folder / str(number)
        at.mkdir()
        for each in FILES:
            shutil.copy(killed / each, at / each)
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        (at / name).write_bytes(damaged)
        said[await check(at, f"byte {place} of {name}")] += 1
        shutil.rmtree(at)
    print(f"{name}: {said}")
    assert said["told"] or name in ("j.db-shm", "j.roll", "j.db")


async def test_any_damaged_byte_of_a_journal_without_a_log(killed: Path, folder: Path) -> None:
    """As an orderly end leaves it; and none of its text is read otherwise than it was written."""
    for each in FILES:
        shutil.copy(killed / each, folder / each)
    async with opened(folder):
        pass
    whole = (folder / "j.db").read_bytes()
    known = (folder / "j.roll").read_bytes()
    said = {"sound": 0, "told": 0}
    for number, place in enumerate(places(len(whole), "alone")):
        at = folder / str(number)
        at.mkdir()
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        (at / "j.db").write_bytes(damaged)
        (at / "j.roll").write_bytes(known)
        said[await check(at, f"byte {place}")] += 1
        shutil.rmtree(at)
    print(said)
    assert said["told"]


@pytest.mark.parametrize("size", [0, 1, 100, 4095, 4096, 10_000])
@pytest.mark.parametrize("log", ["there", "gone"])
async def test_a_journal_that_is_cut_off(copied: Path, size: int, log: str) -> None:
    if log == "gone":
        for name in ("j.db-wal", "j.db-shm"):
            (copied / name).unlink()
    whole = (copied / "j.db").read_bytes()
    (copied / "j.db").write_bytes(whole[:size])
    how = await check(copied, f"{size} bytes")
    assert how == "told" or log == "there"


@pytest.mark.parametrize(
    "files",
    [
        (".db",),
        (".db-wal", ".db-shm"),
        (".roll",),
        (".db", ".db-wal", ".db-shm"),
        (".db-wal", ".db-shm", ".roll"),
    ],
)
async def test_files_that_are_gone(copied: Path, files: tuple[str, ...]) -> None:
    for suffix in files:
        (copied / f"j{suffix}").unlink()
    assert await check(copied, "gone") == "told"


@pytest.mark.parametrize("size", [0, 33, 0.3, 0.9, -1])
async def test_a_log_that_is_cut_off(copied: Path, size: float) -> None:
    whole = (copied / "j.db-wal").read_bytes()
    length = int(len(whole) * size) if 0 < size < 1 else int(size)
    (copied / "j.db-wal").write_bytes(whole[:length])
    assert await check(copied, "cut") == "told"


async def test_a_foreign_log_is_not_taken_for_its_own(copied: Path, folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    subprocess.run([sys.executable, "-c", WRITER, other / "j.db"], check=False)
    shutil.copy(other / "j.db-wal", copied / "j.db-wal")
    assert await check(copied, "foreign") == "told"


async def test_a_journal_of_before_is_known_by_its_roll(copied: Path, folder: Path) -> None:
    """Restored alone from a backup: what it says of promises is old."""
    backup = folder / "backup.db"
    async with opened(copied) as journal:
        with closing(sqlite3.connect(backup)) as to, closing(sqlite3.connect(journal.path)) as own:
            own.backup(to)
        await journal.write(commit(20))
        await journal.write(noted(3, "job-complete"))
        await journal.write(
            Statement("UPDATE commits SET ended = 1.9e9 WHERE id = ?", (f"{4:032x}",))
        )
    shutil.copy(backup, copied / "j.db")
    async with opened(copied) as journal:
        assert journal.loss is not None
        assert {(int(lost.id, 16), lost.how) for lost in journal.loss.promises} == {
            (20, "gone"), (3, "old"), (4, "over"),
        }  # fmt: skip
        assert journal.loss.all_named
        assert "3 transactions are lost" in journal.loss.why
        found = await rows(journal)
        assert found[f"{20:032x}"]["vm"] == "web20"  # as the roll has it
    (copied / "j.roll").unlink()
    async with opened(copied) as journal:
        assert journal.loss is not None
        assert not journal.loss.all_named
        assert all(lost.how == "perhaps" for lost in journal.loss.promises)


RENAME = os.rename


def dying(left: list[int], *names: Any) -> None:
    """``os.rename``, of a process that is killed after so many."""
    if left[0] == 0:
        raise OSError("killed")
    left[0] -= 1
    RENAME(*names)


async def test_killed_while_a_journal_is_set_aside(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file that is renamed: the next start goes on from there, and nothing more is lost."""
    (copied / "j.db-wal").unlink()
    for count in range(6):
        at = copied / str(count)
        at.mkdir()
        for name in ("j.db", "j.db-shm", "j.roll"):
            shutil.copy(copied / name, at / name)
        monkeypatch.setattr(os, "rename", partial(dying, [count]))
        try:
            async with opened(at):
                pass
        except JournalError:
            pass
        monkeypatch.setattr(os, "rename", RENAME)
        async with opened(at) as journal:
            (loss,) = await journal.read("SELECT * FROM losses")
            assert {each["id"] for each in json.loads(loss["promises"])} >= OPEN
            assert loss["all_named"]


async def test_a_journal_of_the_version_before_is_taken_up(folder: Path) -> None:
    text = FIXTURE.read_text().replace("@FOLDER@", str(folder)).replace("@IDENTITY@", "1.1")
    with closing(sqlite3.connect(folder / "j.db")) as old:
        old.executescript(text)
    for _ in range(2):
        async with opened(folder) as journal:
            assert journal.loss is None
            found = {row["state"]: row for row in await journal.read("SELECT * FROM commits")}
            assert found.keys() == {"done", "running"}
            assert all(row["seal"] for row in found.values())
            assert (await journal.read("SELECT name, spec FROM vms"))[0]["name"] == "web2"
            called = roll.call(journal.path.with_suffix(".roll"))
            assert called is not None
            assert called.open.keys() == {f"commits/{found['running']['id']}", "vms/web2"}


async def test_a_promise_is_in_the_roll_before_it_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    sync = os.fdatasync

    def seen(file: int) -> None:
        sync(file)
        synced.append((folder / "j.roll").read_bytes())

    async with opened(folder) as journal:
        monkeypatch.setattr(os, "fdatasync", seen)
        await journal.write(commit(7))
        assert f"{7:032x}".encode() in synced[-1]


async def test_the_writer_syncs_at_each_commit(folder: Path) -> None:
    async with opened(folder) as journal:
        writer: list[sqlite3.Connection] = []
        transact = journal._transact

        def seen(connection: sqlite3.Connection, batch: Any) -> Any:
            writer.append(connection)
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
            return transact(connection, batch)

        journal._transact = seen  # type: ignore[method-assign, assignment]
        await journal.write(commit(1))
        assert writer
