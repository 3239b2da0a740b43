"""``qmpcommit top``: the VMs of this host, live."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.completing import complete_monitor
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run


@click.command(cls=Command)
@click.argument("globs", shell_complete=complete_monitor, nargs=-1, metavar="[GLOB]...")
@common
def top(globs: tuple[str, ...], **given: Any) -> Answer:
    """The VMs of this host and their jobs, live, with keys to decide them.

    GLOBs are those of 'vms': monitors' sockets, or with --daemon the names of VMs. Keys: p, k and
    a to pivot, keep or abort, space to pause a job or have it go on, s to change its speed, q to
    leave. What changes something is asked for first. It needs Textual: pip install qmpcommit[top].
    """
    options = Options.of(**given)
    if options.as_json:
        raise click.UsageError("top is for people; 'qmpcommit vms --json' has the same as JSON")
    try:
        import textual  # noqa: F401
    except ImportError:
        raise click.UsageError(
            "top needs the package Textual, which is not installed: pip install 'qmpcommit[top]'."
            " 'qmpcommit vms --watch' needs nothing else"
        ) from None
    if not (sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty()):
        raise click.UsageError("top needs a terminal; 'qmpcommit vms --watch' needs none")
    from qmpcommit.cli.running import run

    return run(options, lambda running: _top(running, globs))


async def _top(running: Run, globs: tuple[str, ...]) -> Answer:
    from qmpcommit.cli.live import Live
    from qmpcommit.cli.vms import source_of

    app = Live(source_of(running, globs))

    def end(times: int = 0) -> None:
        app.exit()

    running.on_signal = running.on_deadline = end
    await app.run_async()
    return Answer({}, "", quiet=True)
