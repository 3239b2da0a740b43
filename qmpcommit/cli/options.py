"""What every command takes and gives; imports nothing that costs time."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from qmpcommit.client import default_daemon
from qmpcommit.errors import QmpCommitError
from qmpcommit.units import parse_seconds

if TYPE_CHECKING:
    from qmpcommit.commit.request import Stale

F = TypeVar("F", bound=Callable[..., Any])

PROGRESS = "qmpcommit.progress"
"""Where click keeps what ``--progress`` says."""


class Interrupted(QmpCommitError):
    """A signal has ended the command; `outcome` is how the job ended, where it was seen to end."""

    FACTS = ("vm", "disk", "job_id", "outcome")
    outcome: dict[str, Any] | None


class Answer(NamedTuple):
    """What a command has to say: as JSON, as text, or (on a terminal) by drawing it."""

    data: Mapping[str, Any]
    text: str
    status: int = 0
    quiet: bool = False
    draw: Callable[[], None] | None = None


class Options(NamedTuple):
    """The options that all commands have; `deadline` is on `time.monotonic`'s clock.

    `daemon` is the address of the daemon that is to do it, None for no daemon; `progress` is how
    it is shown, None where that was not said.
    """

    as_json: bool
    quiet: bool
    verbose: int
    timeout: float | None
    deadline: float | None
    daemon: str | None = None
    progress: str | None = None

    @classmethod
    def of(cls, as_json: bool, quiet: bool, verbose: int, timeout: str | None) -> Options:
        """From the command line; raises `InvalidRequest`."""
        seconds = None if timeout is None else parse_seconds(timeout, "timeout")
        deadline = None if seconds is None else time.monotonic() + seconds
        return cls(as_json, quiet, verbose, seconds, deadline, _daemon(), _progress())

    @property
    def program(self) -> str:
        """What a person types before a command that is done in the same way."""
        if self.daemon is None:
            return "qmpcommit"
        if self.daemon == default_daemon():
            return "qmpcommit --daemon"
        return f"qmpcommit --daemon={shlex.quote(self.daemon)}"


def _daemon() -> str | None:
    context = click.get_current_context(silent=True)
    given = context.find_root().params.get("daemon") if context is not None else None
    return given or default_daemon() if given is not None else None


def _progress() -> str | None:
    context = click.get_current_context(silent=True)
    return context.meta.get(PROGRESS) if context is not None else None


def progress_option(command: F) -> F:
    """Add ``--progress``, as those have it that commit; its value is one of `Options`."""

    def keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        ctx.meta[PROGRESS] = value

    return click.option(
        "--progress",
        type=click.Choice(["bar", "plain", "none"]),
        callback=keep,
        expose_value=False,
        help="A bar (as on a terminal), lines every 5 s, or nothing (as elsewhere).",
    )(command)


_COMMON = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    click.option("--quiet", "-q", is_flag=True, help="No progress, and no text but errors."),
    click.option(
        "--timeout",
        metavar="S",
        help="Seconds for all of it, connecting included (also 500ms, 2min).",
    ),
    click.option("--verbose", "-v", count=True, help="Log to standard error; -vv for detail."),
)


def overlay_asked(command: F) -> F:
    """Add the options that say of a fresh overlay what QEMU does not tell of the former one."""
    for option in reversed(_OVERLAY):
        command = option(command)
    return command


def asked_of_overlay(options: str | None, secret: str | None) -> dict[str, Any]:
    """What they say, where they say something; raises `InvalidRequest`."""
    from qmpcommit.commit.overlay.options import OverlayOptions

    asked = OverlayOptions.of(options, secret)
    given = {"overlay_options": dict(asked.options) or None, "overlay_secret": asked.secret}
    return {name: value for name, value in given.items() if value is not None}


_OVERLAY = (
    click.option(
        "--overlay-options",
        metavar="JSON",
        help="Members of blockdev-add for the fresh overlay, as in"
        """ '{"discard": "unmap", "file": {"aio": "native"}}'; else it is like the former one.""",
    ),
    click.option(
        "--overlay-secret",
        metavar="ID",
        help="The secret object of QEMU's that encrypts the fresh overlay of an encrypted disk.",
    ),
)


def shell(command: str, option: str) -> list[str]:
    """What runs a command as a person wrote it.

    Raises `click.UsageError` for an empty one: it would succeed, and decide what nobody meant.
    """
    if not command.strip():
        raise click.UsageError(f"{option} needs a command, and was given an empty one")
    return ["/bin/sh", "-c", command]


_STALE = (
    click.option(
        "--stale",
        type=click.Choice(["leave", "rename", "delete"]),
        help="What becomes of the files that a pivot or merge makes stale: they stay (the default),"
        " are renamed to NAME.stale-JOB, or deleted.",
    ),
    click.option("--delete", is_flag=True, help="The same as --stale delete."),
    click.option("--rename", is_flag=True, help="The former name of --stale rename."),
)


def stale_options(command: F) -> F:
    """Add what says what becomes of stale files."""
    for option in reversed(_STALE):
        command = option(command)
    return command


def stale_of(given: dict[str, Any]) -> Stale:
    """What the three of them say, which are taken out; raises `click.UsageError`."""
    said: list[Stale] = [given.pop("stale")]
    said += [word for word in ("delete", "rename") if given.pop(word)]
    found = list(dict.fromkeys(word for word in said if word))
    if len(found) > 1:
        names = "--delete or --rename" if said[0] is None else "--stale, --delete or --rename"
        raise click.UsageError(f"Give {names}, not {'both' if said[0] is None else 'several'}")
    return found[0] if found else "leave"


def here(path: str | None) -> str | None:
    """A name as a person typed it, relative to where they are; QEMU is somewhere else."""
    return os.path.abspath(path) if path else path


def override_option(command: F) -> F:
    """Add ``--override``, as those have it that work on a disk."""
    text = "With 'claim', take the disk over from whoever holds it. Can be given several times."
    option = click.option("--override", metavar="CHECK", multiple=True, help=text)
    return option(command)


def common(command: F) -> F:
    """Add the options that all commands have."""
    for option in reversed(_COMMON):
        command = option(command)
    return command
