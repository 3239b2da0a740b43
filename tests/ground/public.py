"""What of the public names has to be awaited, entered or iterated, found by looking at them all."""

from __future__ import annotations

import inspect
from typing import Any

import qmpcommit as qc

_RETURNED = ("Async", "Await", "Coroutine", "Events", "Flattening", "Waiting")
"""In the annotation of what a plain function returns, that tell of something to await."""


def to_be_awaited() -> set[str]:
    """``NAME`` or ``CLASS.METHOD`` of every public coroutine, async iterator and context manager.

    Inherited methods count; exceptions have none.
    """
    found: set[str] = set()
    for name in dir(qc):
        value = getattr(qc, name)
        if inspect.isclass(value):
            if not issubclass(value, BaseException):
                found.update(f"{name}.{each}" for each in _methods(value))
        elif callable(value) and _waits(value):
            found.add(name)
    return found


def _methods(cls: type) -> set[str]:
    found: set[str] = set()
    for name in dir(cls):
        if name.startswith("_") and name not in ("__aenter__", "__aexit__", "__anext__"):
            continue
        member = inspect.getattr_static(cls, name)
        if isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        if callable(member) and _waits(member):
            found.add(name)
    return found


def _waits(function: Any) -> bool:
    function = inspect.unwrap(function)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return True
    try:
        returned = str(inspect.signature(function).return_annotation)
    except (TypeError, ValueError):
        return False
    return any(word in returned for word in _RETURNED)
