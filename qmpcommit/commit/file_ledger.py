"""A ledger in a file: a commit, or a group or the like, that survives the process that began it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from contextlib import suppress
from typing import Any

from qmpcommit.commit.ledger import COMMIT, KINDS, Noted, add_note
from qmpcommit.commit.phases import Phase, State
from qmpcommit.errors import InvalidRequest, JobConflict

VERSION = 1


class FileLedger:
    """Notes one commit, group, window or cycle in the file `path`, so that another goes on from it.

    `Session.resume` does that for a commit, ``qc.resume`` for all of them. Each note replaces the
    file as a whole, for its owner only (mode 0600), and is on the disk before the step is taken.
    The file stays when all has ended, for a program that was killed before it had noted the outcome
    itself; remove it then (`remove`). Nothing begins over the notes of what has not ended.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._noted: dict[str, Any] | None = None
        self._writing = threading.Lock()
        self._newest = (0, "")
        self._given, self._written, self._durable = 0, 0, 0

    def __repr__(self) -> str:
        return f"FileLedger({self.path!r})"

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        """Write a step down (see `Ledger.note`); raises OSError where that can't be done."""
        kind = facts.get("kind", COMMIT)
        begins = kind == COMMIT and step == "block-commit"
        mine = facts["plan"].job_id if begins else facts.get("known_as", "")
        noted = self._noted
        if noted is None or begins:
            noted = await asyncio.to_thread(self._read)
        if mine and (kind, mine) != _named(noted) and not noted.get("over", not noted):
            there, other = _named(noted)
            what = f"with job {other}" if there == COMMIT else f"of id {other}"
            raise JobConflict(
                f"{self.path} holds a {there} that has not ended, {what}: resume it, or remove the"
                " file"
            )
        if not mine and "plan" not in noted:
            raise InvalidRequest(
                f"{self.path} can't note {step}: it is for one commit, and none has begun"
            )
        self._noted = add_note({} if begins else noted, step, state, **facts)
        self._noted.setdefault("over", False)
        await asyncio.to_thread(self._write, self._next())

    def moved(self, state: State) -> None:
        """Remember when READY was reached, from which a hold counts, and that all is over."""
        if self._noted is None:
            return
        if state.phase is Phase.READY and "ready" not in self._noted:
            self._noted["ready"] = time.time()
            policy = self._noted.get("plan", {}).get("policy") or {}
            if policy.get("kind") == "hold":
                self._write_soon()
        elif state.phase is Phase.FINISHED:
            self._noted["over"] = True
            self._write_soon()

    def _write_soon(self) -> None:
        """In this thread, for nobody waits for it; what is lost of it does no harm."""
        with suppress(OSError):
            self._write(self._next(), durable=False)

    async def noted(self) -> dict[str, Any]:
        """All that was noted; empty where there is no file. Raises `InvalidRequest`, OSError."""
        self._noted = await asyncio.to_thread(self._read)
        return dict(self._noted)

    def remove(self) -> None:
        """Remove the file, if it is there: the outcome is known elsewhere."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        self._noted = None

    def _next(self) -> tuple[int, str]:
        self._given += 1
        noted = dict(self._noted or {})
        kind = noted.pop("kind", COMMIT)
        self._newest = self._given, json.dumps({"qmpcommit": VERSION, kind: noted})
        return self._newest

    def _read(self) -> dict[str, Any]:
        try:
            with open(self.path, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            return {}
        try:
            held = json.loads(text)
            (kind,) = held.keys() - {"qmpcommit"}
            if held["qmpcommit"] == VERSION and kind in KINDS:
                return {**held[kind], **({} if kind == COMMIT else {"kind": kind})}
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise InvalidRequest(
            f"{self.path} is no ledger of this version of qmpcommit, and is left as it is"
        )

    def _write(self, numbered: tuple[int, str], *, durable: bool = True) -> None:
        """Replace the file with the newest; what others have written meanwhile is not repeated."""
        with self._writing:
            if numbered[0] <= (self._durable if durable else self._written):
                return
            number, text = max(numbered, self._newest)
            made = f"{self.path}.{os.getpid()}-{number}.new"
            file = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                try:
                    data = text.encode()
                    while data:
                        data = data[os.write(file, data) :]
                    if durable:
                        os.fsync(file)
                finally:
                    os.close(file)
                os.rename(made, self.path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(made)
                raise
            self._written = number
            if durable:
                folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
                self._durable = number


def _named(noted: Noted) -> tuple[str, str]:
    """What the notes are of: a commit by its job, all else by its id."""
    kind = noted.get("kind", COMMIT)
    name = noted.get("plan", {}).get("job_id", "") if kind == COMMIT else noted.get("known_as", "")
    return str(kind), str(name)
