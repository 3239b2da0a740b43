"""How a shell's words are completed: what a VM has its monitor, or the daemon, is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from glob import glob
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.client import default_daemon
from qmpcommit.names import SOCKETS

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qmpcommit.client.vm import RemoteVM
    from qmpcommit.session import Session

    Items = list[CompletionItem]

VMS = "/v1/vms?fields=name"

WITHIN = 0.3
"""Seconds that a monitor has to answer while somebody waits for a word."""


def complete_monitor(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Sockets by their usual place, or any path; with ``--daemon`` the VMs that it knows."""
    from click.shell_completion import CompletionItem

    daemon = _daemon(ctx)
    if daemon is not None:
        from qmpcommit.client.host import Client

        async def names() -> list[str]:
            async with Client(daemon, timeout=WITHIN) as host:
                return [str(each["name"]) for each in host.parse_list(await host.ask("GET", VMS))]

        return _within(names, incomplete)
    found = [path for path in sorted(glob(SOCKETS)) if path.startswith(incomplete)]
    return [CompletionItem(path) for path in found] or [CompletionItem(incomplete, type="file")]


def complete_topic(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """The manual's topics, and the commands."""
    from click.shell_completion import CompletionItem

    from qmpcommit.cli.commands import COMMANDS
    from qmpcommit.manual import TOPICS

    names = sorted({*TOPICS, *COMMANDS})
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_disk(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """The disks of the VM whose monitor is given."""

    async def names(vm: Session | RemoteVM) -> list[str]:
        return [disk.name for disk in await vm.disks() if disk.chain]

    return _of(ctx, names, incomplete)


def complete_job(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Its jobs; for a pivot or keep those that are READY."""
    ready = ctx.info_name in ("pivot", "keep")

    async def names(vm: Any) -> list[str]:
        from qmpcommit.client.vm import RemoteVM

        remote = isinstance(vm, RemoteVM)
        found = await (vm.jobs() if remote else vm.execute("query-block-jobs"))
        return [str(job["device"]) for job in found if job["ready"] or not ready]

    return _of(ctx, names, incomplete)


def _daemon(ctx: click.Context) -> str | None:
    """The address of the daemon that is to be asked; None for none."""
    given = ctx.find_root().params.get("daemon")
    return given or default_daemon() if given is not None else None


def _of(
    ctx: click.Context, names: Callable[[Any], Coroutine[Any, Any, list[str]]], incomplete: str
) -> Items:
    daemon, qmp = _daemon(ctx), ctx.params.get("qmp") or os.environ.get("QMPCOMMIT_QMP")
    if not qmp:
        return []
    from qmpcommit.client.host import Client
    from qmpcommit.client.vm import RemoteVM
    from qmpcommit.session import Session

    async def ask() -> list[str]:
        if daemon is None:
            async with Session.connect(qmp, timeout=WITHIN) as vm:
                return await names(vm)
        async with Client(daemon, timeout=WITHIN) as host:
            return await names(RemoteVM(host, qmp))

    return _within(ask, incomplete)


def _within(ask: Callable[[], Coroutine[Any, Any, list[str]]], incomplete: str) -> Items:
    """What is answered in time, of what begins so; whoever types a word is told nothing else."""
    import asyncio

    from click.shell_completion import CompletionItem

    from qmpcommit import log

    async def bounded() -> list[str]:
        async with asyncio.timeout(WITHIN):
            return await ask()

    log.threshold = 100
    try:
        found = asyncio.run(bounded())
    except Exception:
        return []
    return [CompletionItem(name) for name in found if name.startswith(incomplete)]
