"""QEMU's own times of its events, as QMP writes them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def time_of(stamp: object) -> datetime | None:
    """QMP's ``{"seconds", "microseconds"}``; QEMU writes -1 where its clock failed."""
    if not isinstance(stamp, Mapping):
        return None
    seconds, microseconds = stamp.get("seconds"), stamp.get("microseconds")
    if type(seconds) is not int or type(microseconds) is not int or min(seconds, microseconds) < 0:
        return None
    try:
        return _EPOCH + timedelta(seconds=seconds, microseconds=microseconds)
    except OverflowError:
        return None


def stamp_of(when: datetime | None) -> dict[str, int]:
    """The reverse of `time_of`."""
    if when is None:
        return {"seconds": -1, "microseconds": -1}
    since = when - _EPOCH
    return {"seconds": since.days * 86400 + since.seconds, "microseconds": since.microseconds}
