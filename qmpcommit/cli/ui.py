"""``qmpcommit ui``: the daemon's page in a browser."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command
from qmpcommit.client import default_daemon

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run


@click.command(cls=Command)
@click.option("--no-browser", is_flag=True, help="Print the address, and open no browser.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="N",
    help="The port on 127.0.0.1; by default any that is free.",
)
@common
def ui(no_browser: bool, port: int, **given: Any) -> Answer:
    """The daemon's page, in a browser: VMs, chains and commits as they change.

    It shows what you may see, and asks before it decides anything. The address works once, in one
    browser; what is done there is done as you. It is served on this host's loopback alone, until
    Ctrl-C, or for --timeout S.
    """
    options = Options.of(**given)
    if options.daemon is None:
        options = options._replace(daemon=default_daemon())
    from qmpcommit.cli.running import run

    return run(options, lambda running: _ui(running, port, opens=not no_browser))


async def _ui(running: Run, port: int, *, opens: bool) -> Answer:
    import asyncio

    from qmpcommit.cli.relay import Relay
    from qmpcommit.cli.remote import connect
    from qmpcommit.errors import DaemonError

    ending = asyncio.Event()
    async with connect(running.options) as host:
        reply = await host.ask("GET", "/ui/asker.json")
        if reply.status == 404:
            raise DaemonError(
                f"the daemon at {host.wire.address} has no page: it is older than this command",
                address=str(host.wire.address),
            )
        host.parse(reply)
        async with Relay(host.wire, port) as relay:
            running.on_signal = lambda _: ending.set()
            running.on_deadline = ending.set
            _tell(running.options, relay.url)
            with ExitStack() as file:
                if opens:
                    relay.on_enter = file.close
                    _open(_leading_to(relay.url, file))
                await ending.wait()
    return Answer({"address": str(host.wire.address), "ended": "in order"}, "", quiet=True)


def _tell(options: Options, url: str) -> None:
    """The address, at once: whoever asked waits for it, and not for the end."""
    stream = sys.stderr if options.as_json else sys.stdout
    if stream is not None and not options.quiet:
        stream.write(f"{url}\n")
        stream.flush()


def _leading_to(url: str, until: ExitStack) -> str:
    """A file that leads a browser there, as a URL; it is there `until` that is closed.

    All users of the host can read what a browser was started with: so that names only the file,
    which this user alone can read.
    """
    import shutil
    import tempfile
    from pathlib import Path

    from qmpcommit.cli.relay import lead_to
    from qmpcommit.errors import InvalidRequest

    try:
        folder = tempfile.mkdtemp(prefix="qmpcommit-ui-", dir=_own_folder())  # mode 0700
        until.callback(shutil.rmtree, folder, ignore_errors=True)
        file = Path(folder, "open.html")
        file.touch(0o600)
        file.write_text(lead_to(url), encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(
            f"can't write the file that leads the browser to the page: {error}; run it with"
            " --no-browser, and open the address that it prints"
        ) from None
    return file.as_uri()


def _own_folder() -> str | None:
    """``$XDG_RUNTIME_DIR`` where it is this user's and nobody else's; else the temporary folder."""
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    try:
        seen = os.stat(folder)
    except OSError:
        return None
    own = stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.geteuid()
    return folder if own and not seen.st_mode & 0o077 and os.path.isabs(folder) else None


def _open(url: str) -> None:
    """In the browser that this host knows; it may know none, or one that ends when it is left."""
    import threading
    import webbrowser

    threading.Thread(target=webbrowser.open, args=(url,), name="browser", daemon=True).start()
