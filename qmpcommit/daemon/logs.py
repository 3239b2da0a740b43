"""The daemon's log: to standard error, as JSON or for people, and of bounded length."""

from __future__ import annotations

import io
import logging
import sys
import time
from collections import Counter
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog

from qmpcommit import log
from qmpcommit.daemon.config import Config

TOLD = 500
"""Characters of one fact; of a traceback, of one line. What is longer is foreign."""

ALIKE = 100
"""Lines a minute that tell one thing of one VM, or of one commit of its."""

_TRACES = ("where", "exception")


def on_a_terminal() -> bool:
    """Whether a person reads standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


class _Lines(io.TextIOBase):
    """Standard error; no commit fails, and no guest stays frozen, for a log that can't be written.

    Its disk may be full, and who read it may have gone.
    """

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, AttributeError):  # or it was closed before Python began
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, AttributeError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return on_a_terminal()


def shorten(logger: Any, method: str, facts: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A processor: what others have said is told up to a length."""
    for name, value in facts.items():
        if name in _TRACES and isinstance(value, str):
            facts[name] = "\n".join(_short(line) for line in value.splitlines())
        else:
            facts[name] = _short(value)
    return facts


def _short(value: Any) -> Any:
    if isinstance(value, (bool, int, float, type(None))):
        return value
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= TOLD:
        return value
    return f"{text[:TOLD]}... ({len(text)} characters)"


class _NotTooMany:
    """A processor: of lines that are alike, so many a minute; the next one tells what was left."""

    def __init__(self) -> None:
        self._minute = 0
        self._told: Counter[tuple[Any, ...]] = Counter()
        self._left: Counter[tuple[Any, ...]] = Counter()

    def __call__(
        self, logger: Any, method: str, facts: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute = minute
            self._left = self._told - Counter(dict.fromkeys(self._told, ALIKE))
            self._told.clear()
        alike = tuple(str(facts.get(name)) for name in ("event", "vm", "commit", "job", "path"))
        self._told[alike] += 1
        if self._told[alike] > ALIKE and method != "debug":
            raise structlog.DropEvent
        if left := self._left.pop(alike, 0):
            facts["left_out"] = left
        return facts


def configure_log(config: Config) -> None:
    """Logs of the daemon go to standard error, as JSON or for people."""
    level = getattr(logging, config.log_level.upper())
    log.threshold = level
    lines = _Lines()
    render: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if config.log == "console":
        render = structlog.dev.ConsoleRenderer(colors=lines.isatty())
    structlog.configure(
        processors=[
            _NotTooMany(),
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            shorten,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", lines)),
        cache_logger_on_first_use=False,
    )
    # What libraries say over Python's logging has the same form.
    before: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        shorten,
    ]
    handler = logging.StreamHandler(lines)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
            foreign_pre_chain=before,
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Its errors reach us as exceptions, and are told once: here they would be, with what was read.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
