"""The configuration read again while the daemon runs: taken whole, or not at all.

``[limits]``, ``[access]``, users and tokens, rules, cycles and VMs are exchanged. What is promised
goes on as it was promised. What a socket or the journal was opened by can't be exchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpcommit.daemon import systemd
from qmpcommit.daemon.config import Config, load
from qmpcommit.daemon.findings import examine
from qmpcommit.daemon.rights import Askers
from qmpcommit.errors import InvalidRequest, QmpCommitError
from qmpcommit.log import Log

if TYPE_CHECKING:
    from qmpcommit.daemon.engine import Engine

FIXED = ("state", "log", "log_level")
LISTEN = ("socket", "mode", "group", "tcp")
"""Members, of all and of ``[listen]``, that a restart takes."""

Take = Callable[[Config, Askers], object]


class Reloading:
    """Reads the configuration when it is `asked` to; all but the engine `take` a new one."""

    def __init__(self, source: str, engine: Engine, take: Take, asked: asyncio.Event) -> None:
        self._source, self._engine, self._take, self._asked = source, engine, take, asked
        self._log = Log()

    async def run(self) -> None:
        """Whenever it is asked to."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            systemd.notify("RELOADING=1")
            try:
                told = await self._reload()
                self._log.info("reloaded", config=self._source, changed=told)
                systemd.notify("READY=1\nSTATUS=the configuration was read again")
            except QmpCommitError as error:
                self._log.error("reload_refused", why=f"{error.message}. Nothing was changed")
                systemd.notify("READY=1\nSTATUS=the configuration is wrong, and was not taken")
            except Exception as error:  # a bug of ours must not end what is promised
                self._log.warning("bug", error=repr(error))

    async def _reload(self) -> list[str]:
        """What has changed; raises `QmpCommitError`, with nothing changed."""
        config, askers = await asyncio.to_thread(_read, self._source)
        old = self._engine.config
        self._check_fixed(old, config)
        self._engine.check_exchange(config)
        await self._engine.exchange(config)
        self._take(config, askers)
        return [name for name in type(config).model_fields if _differs(old, config, name)]

    def _check_fixed(self, old: Config, new: Config) -> None:
        fixed = [name for name in FIXED if _differs(old, new, name)]
        fixed += [f"listen.{name}" for name in LISTEN if _differs(old.listen, new.listen, name)]
        if fixed:
            raise InvalidRequest(
                f"the configuration {self._source} changes {', '.join(fixed)}, which takes a"
                " restart of the daemon"
            )


def _read(source: str) -> tuple[Config, Askers]:
    config = load(source)
    askers = Askers(config)
    if wrong := examine(config).wrong:
        raise InvalidRequest(f"the configuration {source} is wrong: {'; '.join(wrong)}")
    return config, askers


def _differs(old: object, new: object, name: str) -> bool:
    return bool(getattr(old, name) != getattr(new, name))
