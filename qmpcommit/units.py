"""Sizes, rates and times as people write them."""

from __future__ import annotations

import math
import re

from qmpcommit.errors import InvalidRequest

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTPE])(i?B)?|B)?(?:/s)?", re.IGNORECASE | re.ASCII)
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)?", re.IGNORECASE | re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
MAX_SIZE = 2**63 - 1


def parse_size(value: int | str, what: str = "size") -> int:
    """Bytes from ``1048576``, ``512K``, ``50MiB`` or ``1.5G`` (binary units; ``MB`` as well).

    Raises `InvalidRequest` for anything else, for negatives and for more than 2**63 - 1.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidRequest(f"a {what} is a number of bytes or a text like '50MiB', not {value!r}")
    if isinstance(value, int):
        number = value
    else:
        match = _SIZE.fullmatch(value.strip())
        if not match:
            raise InvalidRequest(
                f"'{value}' is no {what}; write bytes, or a number with K, M, G or T, as in 50MiB"
            )
        power = "KMGTPE".index(match[2].upper()) + 1 if match[2] else 0
        number = (
            int(float(match[1]) * 1024**power) if "." in match[1] else int(match[1]) << 10 * power
        )
    if not 0 <= number <= MAX_SIZE:
        raise InvalidRequest(f"a {what} must be between 0 and 2**63 - 1 bytes, not {value}")
    return number


def parse_seconds(value: float | str, what: str = "time") -> float:
    """Seconds from ``30``, ``"1.5"``, ``"500ms"``, ``"2min"`` or ``"1h"`` (finite, at least 0)."""
    if isinstance(value, str):
        match = _TIME.fullmatch(value.strip())
        if not match:
            raise InvalidRequest(f"'{value}' is no {what}; write seconds, as in 30, 500ms or 2min")
        seconds = float(match[1]) * _SECONDS[(match[2] or "s").lower()]
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequest(f"a {what} is a number of seconds, not {value!r}")
    else:
        seconds = float(value)
    if not math.isfinite(seconds) or seconds < 0:
        raise InvalidRequest(
            f"a {what} must be a finite number of seconds, at least 0, not {value}"
        )
    return seconds


def show_size(size: float | None) -> str:
    """A size for people: ``1.5 GiB``."""
    if size is None:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.3g} {unit}"


def counted(number: int, what: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
