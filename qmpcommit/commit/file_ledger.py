"""A ledger in a file: a commit that survives the process that began it."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from contextlib import suppress
from typing import Any

from qmpcommit.commit.ledger import add_note
from qmpcommit.commit.phases import Phase, State
from qmpcommit.errors import InvalidRequest, JobConflict

VERSION = 1


class FileLedger:
    """Notes one commit in the file `path`, so that `Session.resume` goes on from there.

    Each note replaces the file as a whole, for its owner only (mode 0600), and is on the disk
    before the step is taken. The file stays when the commit has ended, for a program that was
    killed before it had noted the outcome itself; remove it then (`remove`). A commit does not
    begin over the notes of one that has not ended; the disks of a group, and windows, can't be
    noted in one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._noted: dict[str, Any] | None = None
        self._writing = threading.Lock()
        self._given, self._written = 0, 0

    async def note(self, step: str, state: State | None = None, **facts: Any) -> None:
        """Write a step down (see `Ledger.note`); raises OSError where that can't be done."""
        noted = self._noted
        if step == "block-commit":
            noted = await asyncio.to_thread(self._read)
            other = noted.get("plan", {}).get("job_id", "")
            if other != facts["plan"].job_id and not noted.get("over", not noted):
                raise JobConflict(
                    f"{self.path} holds a commit that has not ended, with job {other}: resume it,"
                    " or remove the file"
                )
            noted = {}
        elif noted is None:
            noted = await asyncio.to_thread(self._read)
        if step != "block-commit" and not (noted and "plan" in noted):
            raise InvalidRequest(
                f"{self.path} can't note {step}: it is for one commit, and none has begun"
            )
        self._noted = add_note(noted or {}, step, state, **facts)
        self._noted["over"] = False
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
        return self._given, json.dumps({"qmpcommit": VERSION, "commit": self._noted})

    def _read(self) -> dict[str, Any]:
        try:
            with open(self.path, encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            return {}
        try:
            held = json.loads(text)
            if held["qmpcommit"] == VERSION:
                return dict(held["commit"])
        except (ValueError, TypeError, KeyError):
            pass
        raise InvalidRequest(
            f"{self.path} is no ledger of this version of qmpcommit, and is left as it is"
        )

    def _write(self, numbered: tuple[int, str], *, durable: bool = True) -> None:
        """Replace the file; an older note that comes late replaces no newer one."""
        number, text = numbered
        with self._writing:
            if number < self._written:
                return
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
