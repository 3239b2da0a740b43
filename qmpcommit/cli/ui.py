"""``qmpcommit ui``: the daemon's page in a browser."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.options import Answer, Options, common, default_daemon
from qmpcommit.cli.sections import Command

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
            if opens:
                _open(relay.url)
            await ending.wait()
    return Answer({"address": str(host.wire.address), "ended": "in order"}, "", quiet=True)


def _tell(options: Options, url: str) -> None:
    """The address, at once: whoever asked waits for it, and not for the end."""
    stream = sys.stderr if options.as_json else sys.stdout
    if stream is not None and not options.quiet:
        stream.write(f"{url}\n")
        stream.flush()


def _open(url: str) -> None:
    """In the browser that this host knows; it may know none, or one that ends when it is left."""
    import threading
    import webbrowser

    threading.Thread(target=webbrowser.open, args=(url,), name="browser", daemon=True).start()
