"""``qmpcommit daemon``, which is also installed as ``qmpcommitd``."""

from __future__ import annotations

import sys
from typing import Any

import click

from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command
from qmpcommit.errors import InvalidRequest


@click.command(cls=Command)
@click.option("--config", metavar="FILE", required=True, help="The configuration, in TOML.")
@click.option("--check-config", is_flag=True, help="Say whether it is right, and run nothing.")
@common
def daemon(config: str, check_config: bool, **given: Any) -> Answer:
    """One process a host, many VMs: commits asked for over HTTP, and kept across restarts.

    It needs more packages than the command: pip install 'qmpcommit[daemon]'. It runs until
    SIGTERM, or for --timeout S, and then hands over: jobs stay in QEMU, and the next daemon
    takes them up. SIGHUP has it read the configuration again.
    """
    options = Options.of(**given)
    try:
        from qmpcommit.daemon.config import load
        from qmpcommit.daemon.main import check, serve
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            f"the daemon needs the package {error.name}: pip install 'qmpcommit[daemon]'"
        ) from None
    loaded = load(config)
    found = check(loaded)
    if check_config:
        if found.wrong:
            raise InvalidRequest(f"the configuration {config} is wrong: {'; '.join(found.wrong)}")
        told = "\n".join([f"{config} is right", *(f"note: {each}" for each in found.noted)])
        answer = {"config": config, "right": True, "notes": found.noted}
        return Answer(answer, told, quiet=options.quiet)
    serve(loaded, config, options.timeout, found.wrong)
    return Answer({"config": config, "ended": "in order"}, "", quiet=True)


def main() -> None:
    """``qmpcommitd``."""
    from qmpcommit.cli.main import main as command

    words = sys.argv[1:]
    command(words if words == ["--version"] else ["daemon", *words], name="qmpcommitd")
