"""Logging through structlog, which is imported when the first line is seen by somebody.

One event a fact, ``key=value``, with VM, disk and job bound. An embedder configures structlog
as always; the command raises `threshold` so that a quiet run does not even import it.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

threshold = logging.NOTSET


class Log:
    """A bound logger: the few structlog methods that this package uses.

    A line's own facts count where something of their name is bound.
    """

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

    def error(self, event: str, **facts: Any) -> None:
        """Something is lost, or broken, that a person has to look at."""
        self._write(logging.ERROR, event, facts)

    def _write(self, level: int, event: str, facts: dict[str, Any]) -> None:
        if level >= threshold and (logger := _logger(level)) is not None:
            logger.log(level, event, **{**self._bound, **facts})


_unconfigured: Any = None


def _logger(level: int) -> Any:
    """Where a line of this level goes; None where nobody would see it."""
    global _unconfigured  # noqa: PLW0603  (made once, when the first line is seen)
    structlog = sys.modules.get("structlog")
    if structlog is not None and structlog.is_configured():
        return structlog.get_logger("qmpcommit")
    # structlog's own default prints everything to standard output, which belongs to the
    # embedding program; until it is configured, Python's logging decides.
    standard = logging.getLogger("qmpcommit")
    if not standard.isEnabledFor(level):
        return None
    if _unconfigured is None:
        import structlog as library

        _unconfigured = library.wrap_logger(
            standard,
            processors=[library.processors.KeyValueRenderer(key_order=["event"])],
            wrapper_class=library.stdlib.BoundLogger,
        )
    return _unconfigured
