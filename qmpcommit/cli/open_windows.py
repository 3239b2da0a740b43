"""Snapshot windows that somebody left open, as ``chain`` and ``jobs`` tell of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from qmpcommit.cli.show import show_seconds
from qmpcommit.cli.telling import echo
from qmpcommit.units import show_size

if TYPE_CHECKING:
    from qmpcommit.block.chain import Disk
    from qmpcommit.block.graph import BlockGraph


def tell_of_windows(
    disks: Iterable[Disk], qmp: str, *, cwd: str | None = None, graph: BlockGraph | None = None
) -> dict[str, Any]:
    """Warn on standard error; the members ``windows`` and ``window_remains`` of the JSON.

    `windows` are the overlays that disks write to, `window_remains` what a killed process left
    beside them, for which the `graph` has to be known.
    """
    from qmpcommit.window.remains import remains_of
    from qmpcommit.window.run import windows_of

    close = f"qmpcommit recover {shlex.quote(qmp)}"
    windows = [{**each.model_dump(mode="json"), "next": close} for each in windows_of(disks, cwd)]
    remains = [
        {**each.model_dump(mode="json"), "next": close}
        for each in (remains_of(graph) if graph is not None else ())
    ]
    for window in windows:
        age = "" if window["age"] is None else f", open for {show_seconds(window['age'])}"
        size = "" if window["size"] is None else f", {show_size(window['size'])} by now"
        echo(
            f"qmpcommit: {window['disk']} is in a window: its guest writes to {window['overlay']}"
            f"{age}{size}, which grows until the window is closed. If whoever opened it is gone:"
            f" '{close}'",
            err=True,
        )
    for each in remains:
        echo(
            f"qmpcommit: {each['what']}: {each['message']}. If whoever did it is gone:"
            f" '{close}' (--agent SOCKET if it was frozen through its agent)",
            err=True,
        )
    return {"windows": windows, "window_remains": remains}
