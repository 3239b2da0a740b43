"""``qmpcommit completion``: what a shell needs to complete this command's words."""

from __future__ import annotations

from typing import Any

import click

from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command

SHELLS = ("bash", "zsh", "fish")


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(SHELLS), metavar="SHELL")
@common
def completion(shell: str, **given: Any) -> Answer:
    """Print what completes this command's words in bash, zsh or fish.

    Commands, options, monitors' sockets, disks and jobs are completed; what a VM has its monitor
    is asked for, which has 300 ms for it.
    """
    options = Options.of(**given)
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    text = kind(root, {}, "qmpcommit", "_QMPCOMMIT_COMPLETE").source()
    return Answer({"shell": shell, "text": text}, text, quiet=options.quiet)
