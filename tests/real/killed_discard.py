"""A discard whose process ends in the middle, as seen by who comes next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qmpcommit.cycles.book import RoundBook


class Killed(BaseException):
    """The process has ended here: nobody catches it."""


@contextmanager
def killed_at(step: str, place: int = 1) -> Iterator[None]:
    """In the block a discard notes this step for the `place`-th time, and does no more."""
    count = 0

    async def note(self: RoundBook, number: int, name: str, **facts: Any) -> None:
        nonlocal count
        count += name == step
        if count == place:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundBook, "note_of", note)
        with pytest.raises(Killed):
            yield
