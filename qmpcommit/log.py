"""Logging through structlog, which is imported when the first line is written.

One event a fact, ``key=value``, with VM, disk and job bound. An embedder configures structlog
as always; the command raises `threshold` so that a quiet run does not even import it.
"""

from __future__ import annotations

import logging
from typing import Any

threshold = logging.NOTSET


class Log:
    """A bound logger: the few structlog methods that this package uses."""

    __slots__ = ("_bound",)

    def __init__(self, **bound: Any) -> None:
        self._bound = bound

    def bind(self, **more: Any) -> Log:
        """A logger whose lines carry these members too."""
        return Log(**{**self._bound, **more})

    def debug(self, event: str, **facts: Any) -> None:
        """Detail for whoever follows one commit step by step."""
        self._write(logging.DEBUG, event, facts)

    def info(self, event: str, **facts: Any) -> None:
        """A step of a commit."""
        self._write(logging.INFO, event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        """Something that a person should look at."""
        self._write(logging.WARNING, event, facts)

    def _write(self, level: int, event: str, facts: dict[str, Any]) -> None:
        if level < threshold:
            return
        _logger().log(level, event, **self._bound, **facts)


def _logger() -> Any:
    import structlog

    if structlog.is_configured():
        return structlog.get_logger("qmpcommit")
    # structlog's own default prints everything to standard output, which belongs to the
    # embedding program; until it is configured, Python's logging decides.
    return structlog.wrap_logger(
        logging.getLogger("qmpcommit"),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
