"""``qmpcommit help``: the manual."""

from __future__ import annotations

from typing import Any

import click

from qmpcommit.cli.commands import COMMANDS
from qmpcommit.cli.completing import complete_topic
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command


@click.command("help", cls=Command)
@click.argument("topic", required=False, shell_complete=complete_topic)
@common
def help_(topic: str | None, **given: Any) -> Answer:
    """Read the manual: the list of its topics, or one of them, as markdown.

    TOPIC is a topic, or a command, whose options are told. A terminal gets it page by page.
    """
    options = Options.of(**given)
    from qmpcommit.manual import TOPICS, page, title

    if topic is None:
        titles = {name: title(name) for name in TOPICS}
        width = max(map(len, titles))
        lines = [f"  {name:{width}}  {said}" for name, said in titles.items()]
        text = "\n".join(["The manual's topics, as in 'qmpcommit help commit':", *lines])
        return Answer({"topics": titles}, text, quiet=options.quiet)
    if topic in TOPICS:
        text = page(topic).rstrip("\n")
    elif topic in COMMANDS:
        context = click.get_current_context().find_root()
        assert isinstance(context.command, click.Group)
        command = context.command.get_command(context, topic)
        assert command is not None
        text = command.get_help(click.Context(command, context, topic))
    else:
        from difflib import get_close_matches

        near = get_close_matches(topic, [*TOPICS, *COMMANDS])
        meant = f"Did you mean {' or '.join(near)}? " if near else ""
        raise click.UsageError(
            f"The manual has no topic '{topic}'. {meant}'qmpcommit help' lists the topics"
        )
    return Answer(
        {"topic": topic, "text": text},
        text,
        quiet=options.quiet,
        draw=lambda: click.echo_via_pager(f"{text}\n"),
    )
