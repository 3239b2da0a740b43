"""What a caller asks of a fresh overlay, beyond what it takes from the one that it follows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from qmpcommit.errors import InvalidRequest
from qmpcommit.values import Record, record

_OURS = frozenset(
    ("driver", "node-name", "backing", "encrypt", "data-file", "read-only", "auto-read-only",
     "force-share", "filename")
)  # fmt: skip
"""Members of ``blockdev-add`` that are not a caller's to say."""


@record
class OverlayOptions(Record):
    """`options` are members of QEMU's ``blockdev-add`` for the overlay's qcow2 node.

    Those of its protocol node are in their member ``file``:
    ``{"discard": "unmap", "file": {"aio": "native"}}``. `secret` is the id of a secret object
    that QEMU has, with which the overlay of an encrypted disk is encrypted.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    secret: str | None = None

    def __post_init__(self) -> None:
        _check(self.options, "overlay_options")
        _check(self.options.get("file", {}), "the file of overlay_options")
        if self.secret is not None and (not isinstance(self.secret, str) or not self.secret):
            raise InvalidRequest(
                f"overlay_secret is the id of a secret object of QEMU's, not {self.secret!r}"
            )

    @classmethod
    def of(
        cls, options: Mapping[str, Any] | str | None = None, secret: str | None = None
    ) -> OverlayOptions:
        """From what a caller gave, `options` perhaps as JSON; raises `InvalidRequest`."""
        given: Any = {} if options is None else options
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(
                    f"""overlay_options is no JSON ({error}); write for example {{"discard":"""
                    """ "unmap", "file": {"aio": "native"}}"""
                ) from None
        return cls(given, secret)


def _check(options: object, what: str) -> None:
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise InvalidRequest(f"{what} is an object of blockdev-add's members, not {options!r}")
    ours = sorted(_OURS.intersection(options))
    if ours:
        hint = " (overlay_secret encrypts)" if "encrypt" in ours else ""
        raise InvalidRequest(
            f"{what} can't have {', '.join(ours)}, which the overlay is made with{hint}"
        )
