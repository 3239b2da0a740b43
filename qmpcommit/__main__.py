"""The installed command, and ``python -m qmpcommit``.

``--version`` and ``--help`` answer although nothing else is installed.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command, or say what is missing for it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Nothing is begun while all is imported; the command listens for itself from then on.
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    try:
        from qmpcommit.cli.main import main as command
    except ModuleNotFoundError as error:
        sys.exit(_without(str(error.name), sys.argv[1:]))
    command()


def _without(missing: str, words: list[str]) -> str | None:
    from qmpcommit import __version__
    from qmpcommit.cli.commands import help_without

    if words[:1] == ["--version"]:
        sys.stdout.write(f"qmpcommit {__version__}\n")
    elif words[:1] in (["--help"], ["-h"]):
        sys.stdout.write(help_without(missing))
    else:
        return f"qmpcommit: the package {missing} is not installed: pip install 'qmpcommit[cli]'"
    return None


if __name__ == "__main__":
    main()
