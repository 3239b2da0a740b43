"""The command's entry: the table of commands, and what is printed in the end.

Nothing but click is imported until a command runs, so that ``--help`` and ``--version`` answer
at once. Every way out passes `main`: one JSON object with ``--json``, text for people without,
and the exit status.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

import click

from qmpcommit import __version__
from qmpcommit.cli import signals
from qmpcommit.cli.commands import COMMANDS, NO_DAEMON, STATUSES
from qmpcommit.cli.options import Answer, Interrupted
from qmpcommit.cli.telling import visible
from qmpcommit.client import DEFAULT_SOCKET
from qmpcommit.errors import (
    CommitNotFound,
    ConnectError,
    DiskNotFound,
    InvalidRequest,
    JobNotFound,
    MonitorBusy,
    NotReady,
    OnlyIfFailed,
    PolicyRequired,
    QmpCommitError,
    VMNotFound,
)

FAILED, USAGE, OTHERWISE, NOT_FOUND, NOT_READY, INTERRUPTED = 1, 2, 3, 4, 5, signals.INTERRUPTED

_EXTRA = ("h11", "rich")
"""Packages of the extra "cli" that are imported only where they are needed."""

_STATUS: tuple[tuple[type[QmpCommitError], int], ...] = (
    (Interrupted, INTERRUPTED),
    (InvalidRequest, USAGE),
    (PolicyRequired, USAGE),
    (OnlyIfFailed, OTHERWISE),
    (MonitorBusy, FAILED),  # it is there, and somebody has it
    (ConnectError, NOT_FOUND),
    (DiskNotFound, NOT_FOUND),
    (JobNotFound, NOT_FOUND),
    (VMNotFound, NOT_FOUND),
    (CommitNotFound, NOT_FOUND),
    (NotReady, NOT_READY),
)


_UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""What a write may end with whose reader is a file, or nobody."""

_OF_ALL = re.compile(r"--json|--quiet|--verbose|--timeout(=.*)?|-[qv]+", re.DOTALL)


class Commands(click.Group):
    """A group whose commands are imported when they are called.

    ``--daemon`` gets its optional value only where the next word can be an address; it may stand
    after a command's name too, and what all commands take before it.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join ``--daemon`` with its value, and have the command find what is its own."""
        args = _daemon_first(args)
        place = 0
        own: list[str] = []
        while place < len(args) and args[place].startswith("-") and args[place] != "--":
            if _OF_ALL.fullmatch(args[place]):
                words = 1 + (args[place] == "--timeout")
                own += args[place : place + words]
                args = [*args[:place], *args[place + words :]]
                continue
            place += 1
        if place < len(args):  # else no command is there, which is what is said
            args = [*args[: place + 1], *own, *args[place + 1 :]]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say of what is no command what may have been meant."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS)
            meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            ctx.fail(f"No such command '{args[0]}'.{meant}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in the order of a commit's life."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"qmpcommit.cli.{module}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List them without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.command(
    cls=Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"\b\n{STATUSES}",
)
@click.version_option(__version__, prog_name="qmpcommit", message="%(prog)s %(version)s")
@click.option(
    "--daemon",
    metavar="[SOCKET]",
    help="Have qmpcommitd do it, and name the VM as it does in the place of QMP. SOCKET is a path"
    " with a '/' in it, or tcp:HOST:PORT with the token in the file $QMPCOMMIT_TOKEN_FILE; by"
    f" default $QMPCOMMIT_DAEMON or {DEFAULT_SOCKET}.",
)
@click.pass_context
def cli(ctx: click.Context, daemon: str | None) -> None:
    """Live block commit over QMP, both phases of it.

    QMP is the path of a QEMU monitor's socket (-qmp unix:PATH,server=on,wait=off) or
    tcp:HOST:PORT; DISK a qdev id or QOM path, drive alias, node-name or image file.

    --json, --quiet, --timeout S, --verbose and --daemon go before or after any command's name.
    Where $QMPCOMMIT_QMP is set, QMP may be left out. 'qmpcommit help' is the manual.
    """
    asked = ctx.invoked_subcommand or ""
    if daemon is not None and asked in NO_DAEMON:
        raise click.UsageError(f"'{asked}' is not done through a daemon: {NO_DAEMON[asked]}")


def _daemon_first(args: list[str]) -> list[str]:
    """``--daemon`` with its value before the command, wherever before ``--`` it stands."""
    found: list[str] = []
    left: list[str] = []
    words = iter(args[: args.index("--")] if "--" in args else args)
    word = next(words, None)
    while word is not None:
        after = next(words, None)
        if word == "--daemon":
            given = after is not None and ("/" in after or after.startswith("tcp:"))
            found.append(f"--daemon={after if given else ''}")
            word = next(words, None) if given else after
            continue
        (found if word.startswith("--daemon=") else left).append(word)
        word = after
    return [*found, *left, *(args[args.index("--") :] if "--" in args else ())]


def main(arguments: Sequence[str] | None = None, *, name: str | None = None) -> NoReturn:
    """Run the command line and exit with its status.

    Without `arguments`, or with the `name` of another program, this is the process's own command
    line, and the process ends at once: taking the interpreter apart would cost a fifth of a short
    run, and free nothing that the kernel does not.
    """
    own = arguments is None or name is not None
    gc.set_threshold(50_000)  # imports make objects, not garbage: looking for it costs 5 ms
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
    as_json = "--json" in ours
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may hold any byte
    signals.listen()
    if own:
        signals.keep_stderr()
    try:
        if not arguments and sys.stderr is not None and sys.stderr.isatty():
            status = _tell_of_commands()
        else:
            status = _say(_call(arguments), as_json)
    except (KeyboardInterrupt, click.Abort):
        # Where a job could have been started, signals do not come as exceptions.
        status = _complain(Interrupted("interrupted; nothing was sent"), as_json)
    except click.ClickException as error:
        status = _complain(error, as_json)
    except QmpCommitError as error:
        status = _complain(error, as_json)
    except OSError as error:  # help, which click writes
        if error.errno in _UNWRITTEN and error.filename is None:
            status = _unheard(error, 0)
        else:
            status = _complain(error, as_json)
    except Exception as error:  # a bug, of which a user needs no traceback
        if _verbose(ours):
            import traceback

            traceback.print_exc()
        status = _complain(error, as_json)
    if own:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _call(arguments: list[str]) -> Any:
    return cli.main(arguments, prog_name="qmpcommit", standalone_mode=False, obj=arguments)


def _verbose(arguments: Sequence[str]) -> bool:
    return any(a == "--verbose" or (a[:2] == "-v" and not a.strip("-v")) for a in arguments)


def _say(answer: object, as_json: bool) -> int:
    if not isinstance(answer, Answer):  # --help and --version
        return FAILED if sys.stdout is None else answer if isinstance(answer, int) else 0
    try:
        if as_json:
            _print_json(answer.data)
        elif not answer.quiet:
            if answer.draw is not None and sys.stdout is not None and sys.stdout.isatty():
                answer.draw()
            else:
                _print(answer.text, told=True)
    except OSError as error:
        return _unheard(error, answer.status)
    return answer.status


def _unheard(error: OSError, status: int) -> int:
    """Standard output takes nothing: never status 0, although what was asked is done.

    Of a reader who has gone, as after ``| head``, or who was never there nothing is said.
    """
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains at its end
    gone = isinstance(error, BrokenPipeError) or sys.stdout is None
    if not gone and sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(
                f"qmpcommit: can't write to standard output: {error.strerror}. The command itself"
                f" had ended with status {status}\n"
            )
    return status or FAILED


def _complain(error: Exception, as_json: bool) -> int:
    """Say what went wrong, as one paragraph or one object; the exit status."""
    status = FAILED
    said: dict[str, object]
    if isinstance(error, QmpCommitError):
        said = error.to_dict()
        status = next((s for kind, s in _STATUS if isinstance(error, kind)), FAILED)
        if isinstance(error, OnlyIfFailed) and not _has_answered(error.exit_status):
            status = FAILED
    elif isinstance(error, click.ClickException):
        said = {"type": "UsageError", "message": _usage_message(error)}
        status = USAGE
    elif isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in _EXTRA:
        what = f"the package {str(error.name).split('.')[0]} is not installed"
        said = {"type": "MissingPackage", "message": f"{what}: pip install 'qmpcommit[cli]'"}
    else:
        said = {
            "type": type(error).__name__,
            "message": f"unexpected {type(error).__name__}: {error}. This is a bug in qmpcommit;"
            " please report it, with what the same command prints with -v",
        }
    if as_json:
        try:
            _print_json({"error": said})
        except OSError as unwritten:
            return _unheard(unwritten, status)
    elif sys.stderr is not None:
        paragraph = visible(" ".join(str(said["message"]).split()))
        with suppress(OSError):  # nobody may be reading any more: the status is left
            sys.stderr.write(f"qmpcommit: {paragraph}\n")
    return status


def _has_answered(status: int | None) -> bool:
    """Whether an only_if has decided; one that could not be run, or was killed, has not."""
    from qmpcommit.commit.policy import is_answer

    return is_answer(status)


def _tell_of_commands() -> int:
    """Who types the bare name on a terminal is helped; elsewhere a line has to do."""
    assert sys.stderr is not None
    context = click.Context(cli, info_name="qmpcommit", **cli.context_settings)
    sys.stderr.write(f"{cli.get_help(context)}\n")
    return USAGE


def _usage_message(error: click.ClickException) -> str:
    message = error.format_message().rstrip(".")
    message += "" if message.endswith("?") else "."
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "qmpcommit"
    return f"{message} See '{where} --help'"


def _print_json(value: object) -> None:
    import json

    _print(json.dumps(value))


def _print(text: str, *, told: bool = False) -> None:
    """To standard output, `told` to a person; raises OSError where it can't be written."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed")
    if told:
        text = visible(text)
        if sys.stdout.isatty():
            from qmpcommit.cli.tables import coloured

            text = coloured(text)
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
