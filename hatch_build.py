"""What a wheel has beside the package: man pages, made from the manual, and completions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SharedData(BuildHookInterface):  # type: ignore[type-arg,misc]
    """Writes them into the build's folder, and names them as data that are installed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the wheel is put together."""
        sys.path.insert(0, self.root)
        from qmpcommit.cli.commands import COMMANDS, COMPLETIONS, STATUSES
        from qmpcommit.manual.roff import man_pages

        pages = man_pages({name: line for name, (_, line) in COMMANDS.items()}, STATUSES)
        files = {f"man/man{name[-1]}/{name}": text for name, text in pages.items()}
        for place, text in {**files, **COMPLETIONS}.items():
            made = Path(self.directory) / "share" / place
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(text)
            build_data["shared_data"][str(made)] = f"share/{place}"
