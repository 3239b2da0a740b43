"""How a shell's words are completed: what a VM has its monitor is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from glob import glob
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.names import SOCKETS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qmpcommit.session import Session

    Items = list[CompletionItem]

WITHIN = 0.3
"""Seconds that a monitor has to answer while somebody waits for a word."""


def complete_monitor(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Sockets by their usual place, or any path."""
    from click.shell_completion import CompletionItem

    found = [path for path in sorted(glob(SOCKETS)) if path.startswith(incomplete)]
    return [CompletionItem(path) for path in found] or [CompletionItem(incomplete, type="file")]


def complete_disk(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """The disks of the VM whose monitor is given."""

    async def names(vm: Session) -> list[str]:
        return [disk.name for disk in await vm.disks() if disk.chain]

    return _of(ctx, names, incomplete)


def complete_job(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Its jobs; for a pivot or keep those that are READY."""
    ready = ctx.info_name in ("pivot", "keep")

    async def names(vm: Session) -> list[str]:
        found = await vm.execute("query-block-jobs")
        return [str(job["device"]) for job in found if job["ready"] or not ready]

    return _of(ctx, names, incomplete)


def _of(
    ctx: click.Context, names: Callable[[Any], Coroutine[Any, Any, list[str]]], incomplete: str
) -> Items:
    qmp = ctx.params.get("qmp") or os.environ.get("QMPCOMMIT_QMP")
    if not qmp or ctx.find_root().params.get("daemon") is not None:
        return []
    import asyncio

    from click.shell_completion import CompletionItem

    from qmpcommit import log
    from qmpcommit.session import Session

    async def ask() -> list[str]:
        async with asyncio.timeout(WITHIN), Session.connect(qmp, timeout=WITHIN) as vm:
            return await names(vm)

    log.threshold = 100
    try:
        found = asyncio.run(ask())
    except Exception:  # whoever types a word is told nothing of it
        return []
    return [CompletionItem(name) for name in found if name.startswith(incomplete)]
