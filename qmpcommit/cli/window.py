"""``qmpcommit window`` and ``qmpcommit flatten``."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.completing import complete_disk, complete_monitor
from qmpcommit.cli.freezing import freezing, sockets_of
from qmpcommit.cli.held import tell_of_held
from qmpcommit.cli.options import (
    Answer,
    Options,
    asked_of_overlay,
    common,
    here,
    overlay_asked,
    override_option,
    progress_option,
)
from qmpcommit.cli.sections import Command
from qmpcommit.cli.show import flattened_text, remarks
from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run
    from qmpcommit.commit.outcome import CommitOutcome
    from qmpcommit.window.records import GroupWindow


@click.command(cls=Command, context_settings={"ignore_unknown_options": False})
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("words", nargs=-1, metavar="DISK... -- COMMAND...")
@click.option(
    "--and",
    "others",
    nargs=2,
    multiple=True,
    metavar="QMP DISK",
    help="A disk of another VM, at the same instant (--freeze). Can be given several times.",
)
@click.option("--close", is_flag=True, help="Close the windows that a crash has left open.")
@click.option(
    "--overlay",
    "--overlay-dir",
    "overlay_dir",
    metavar="DIR",
    help="Where the overlays are; else beside the files.",
)
@overlay_asked
@freezing
@click.option("--bandwidth", metavar="RATE", help="Bytes per second at most, when it closes.")
@override_option
@progress_option
@common
def window(
    qmp: str,
    words: tuple[str, ...],
    *,
    others: tuple[tuple[str, str], ...],
    close: bool,
    overlay_dir: str | None,
    overlay_options: str | None,
    overlay_secret: str | None,
    freeze: Any,
    agents: tuple[str, ...],
    bandwidth: str | None,
    override: tuple[str, ...],
    **given: Any,
) -> Answer:
    """Run COMMAND while the disks' files stand still; the guest goes on, on fresh overlays.

    In COMMAND, {DISK} stands for the file of that disk, which is one instant's image of all of
    them until COMMAND ends, as in: qmpcommit window QMP vda -- cp {vda} /backup/. Where several
    VMs have a disk of that name, {1.vda} is the first VM's. A shell is given them by variables,
    as in: -- sh -c 'cp "$QMPCOMMIT_FILE_vda" /backup/', or as arguments. Then the
    overlays are committed back and deleted. The exit status is COMMAND's; 1 where the window
    could not be opened or closed, or where somebody else has changed the files meanwhile. After a
    crash, 'qmpcommit window --close QMP' closes it, lets a guest go on that is still quiesced for
    it (--agent, if it was frozen so), and removes what was made and not used (--overlay too, if
    it was given then); not while whoever opened it lives.
    """
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    if close:
        if words or others or overlay_options or overlay_secret:
            raise click.UsageError("With --close give QMP alone")
        if options.daemon is not None:
            raise click.UsageError(
                "The daemon closes its windows by itself; others that it finds are closed by"
                " 'DELETE /v1/windows/NAME', or with --close and without --daemon"
            )
        where = {
            "bandwidth": bandwidth,
            "agents": agents[0] if agents else None,
            "overlay": here(overlay_dir),
            "override": override,
        }
        return run(options, lambda running: _close(running, qmp, where))
    disks, command = _parted(click.get_current_context(), words)
    request = {
        "overlay": here(overlay_dir),
        "freeze": freeze,
        "bandwidth": bandwidth,
        **asked_of_overlay(overlay_options, overlay_secret),
    }
    if override and options.daemon is not None:
        raise click.UsageError("--override is for a window without the daemon")
    if override:
        request["override"] = override
    wanted = {qmp: disks}
    for other, disk in others:
        wanted.setdefault(other, []).append(disk)
    if len(wanted) > 1 and freeze is None:
        raise click.UsageError(
            "Several VMs have one instant only while their guests stand still: --freeze pause, or"
            " --freeze agent"
        )
    from qmpcommit.cli.placeholders import check_known

    check_known(command, _names(wanted))
    sockets = sockets_of(freeze, wanted, agents)
    if len(wanted) == 1:
        request |= {"disks": wanted[qmp], "agents": sockets.get(qmp)}
        return run(options, lambda running: _window(running, qmp, command, request))
    return run(options, lambda running: _windows(running, wanted, sockets, command, request))


def _names(wanted: Mapping[str, list[str]]) -> list[str]:
    """What the disks' files are asked for by: {vda}, or {1.vda} where several VMs have one."""
    if len(wanted) == 1:
        return [disk for disks in wanted.values() for disk in disks]
    names = [disk for disks in wanted.values() for disk in disks]
    numbered = [f"{n}.{disk}" for n, disks in enumerate(wanted.values(), 1) for disk in disks]
    return [*numbered, *(disk for disk in names if names.count(disk) == 1)]


def _parted(context: click.Context, words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """The disks and the command, which ``--`` parts; click itself has taken that away."""
    line = list(context.obj or ())
    if "--" not in line:
        raise click.UsageError("Give the command after '--', as in: window QMP vda -- cp {vda} /b/")
    command = line[line.index("--") + 1 :]
    disks = list(words[: len(words) - len(command)])
    if not disks or not command:
        raise click.UsageError("Give at least one DISK, and a COMMAND after '--'")
    return disks, command


async def _window(running: Run, qmp: str, command: list[str], request: dict[str, Any]) -> Answer:
    async with running.vm(qmp) as vm:
        await tell_of_held(vm, qmp)
        running.so_far = _undone(qmp)
        async with _shown_closing(running, qmp, [vm]), vm.snapshot(**request) as window:
            files = {disk: frozen.filename for disk, frozen in window.items()}
            status = await _run(
                running, command, files, {disk: each.astray for disk, each in window.items()}
            )
    data = {"status": status, **_told(window)}
    return _closed(running, data, files, status, window.outcomes)


async def _windows(
    running: Run,
    wanted: Mapping[str, list[str]],
    agents: Mapping[str, str],
    command: list[str],
    request: dict[str, Any],
) -> Answer:
    """The same over several VMs."""
    running.so_far = _undone(*wanted)
    async with _over_several(running, wanted, agents, request) as window:
        names = [disk for _, disk in window]
        files, lost = {}, {}
        for number, of in enumerate(window.of.values(), 1):
            for disk, frozen in of.items():
                for name in (f"{number}.{disk}", *([disk] if names.count(disk) == 1 else [])):
                    files[name], lost[name] = frozen.filename, frozen.astray
        status = await _run(running, command, files, lost)
    each = [{"vm": getattr(vm, "name", vm), **_told(of)} for vm, of in window.of.items()]
    data = {"status": status, "windows": each}
    outcomes = [outcome for of in window.of.values() for outcome in of.outcomes]
    return _closed(running, data, files, status, outcomes)


@asynccontextmanager
async def _over_several(
    running: Run,
    wanted: Mapping[str, list[str]],
    agents: Mapping[str, str],
    request: dict[str, Any],
) -> AsyncIterator[GroupWindow[Any]]:
    """Opened from here over the VMs' monitors, or by the daemon that knows them."""
    async with AsyncExitStack() as stack:
        if running.options.daemon is not None:
            from qmpcommit.cli.remote import connect

            host = await stack.enter_async_context(connect(running.options))
            named = [(vm, disk) for vm, disks in wanted.items() for disk in disks]
            opening: Any = host.snapshot(named, agents=agents, **request)
        else:
            from qmpcommit.window.group import snapshot

            vms = {qmp: await stack.enter_async_context(running.connect(qmp)) for qmp in wanted}
            for qmp, vm in vms.items():
                await tell_of_held(vm, qmp)
            pairs = [(vms[qmp], disk) for qmp, disks in wanted.items() for disk in disks]
            sockets = {vms[qmp]: socket for qmp, socket in agents.items()}
            opening = snapshot(pairs, agents=sockets, **request)
            await stack.enter_async_context(_shown_closing(running, "", vms.values()))
        yield await stack.enter_async_context(opening)


def _shown_closing(
    running: Run, qmp: str, vms: Collection[Any]
) -> AbstractAsyncContextManager[None]:
    """The progress of the commits that close a window; a daemon's are its own."""
    from qmpcommit.cli.bar import Bar
    from qmpcommit.session import Session

    return Bar(running.options, qmp).of_all([vm for vm in vms if isinstance(vm, Session)])


def _undone(*qmps: str) -> str:
    """What a window leaves that was not opened yet."""
    return f"what had been made of the window was removed; {_shown(*qmps)}"


def _shown(*qmps: str) -> str:
    commands = " and ".join(f"'qmpcommit chain {shlex.quote(qmp)}'" for qmp in qmps)
    return f"{commands} would warn of what is left"


def _told(window: Any) -> dict[str, Any]:
    return {
        "window": window.name,
        "disks": [frozen.model_dump() for frozen in window.values()],
        "quiesced": window.quiesced,
        "outcomes": [outcome.model_dump(mode="json") for outcome in window.outcomes],
    }


def _closed(
    running: Run,
    data: Any,
    files: Mapping[str, str],
    status: int,
    outcomes: Iterable[CommitOutcome],
) -> Answer:
    names = ", ".join(dict.fromkeys(files.values()))
    text = f"the window on {names} is closed; the command ended with status {status}"
    if running.timed_out:
        text += f"; it was told to end, for the time was up ({running.options.timeout:g} s)"
    text = "\n".join([text, *remarks(outcomes)])
    return Answer(data, text, status=status, quiet=running.options.quiet)


async def _run(
    running: Run, command: list[str], files: Mapping[str, str], lost: Mapping[str, str]
) -> int:
    """The command in the foreground; Ctrl-C, SIGTERM and SIGHUP are passed on to it.

    It is not run where it asks for a file whose name leads to another one from here.
    """
    import asyncio

    from qmpcommit.cli.placeholders import filled, used, variables
    from qmpcommit.cli.watchdog import watchdog
    from qmpcommit.errors import ChainError

    wanted = used(command, list(files))
    for disk, why in lost.items():
        if why and disk in wanted:
            raise ChainError(
                f"{{{disk}}} would not be that disk's file here: {why}. The command was not run;"
                " run it where QEMU's names mean the same files"
            )
        if why and "." not in disk:
            echo(f"qmpcommit: the command is not told the file of {disk}: {why}", err=True)
    found = {disk: name for disk, name in files.items() if not lost.get(disk)}
    command = filled(command, files)
    early: list[int] = []  # the command gets them when it is there
    running.on_signal, running.on_deadline = early.append, lambda: early.append(0)
    async with watchdog() as watch:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdout=2 if running.options.as_json else None,
                env={**os.environ, **variables(found)},
                start_new_session=True,
            )
        except OSError as error:
            echo(f"qmpcommit: {command[0]} can't be run: {error.strerror}", err=True)
            return 127 if isinstance(error, FileNotFoundError) else 126
        watch(process.pid)

        def end(times: int = 0) -> None:
            number = signal.SIGINT if times == 1 else signal.SIGTERM
            if running.signal == signal.SIGHUP and not running.timed_out:
                number = signal.SIGHUP
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

        running.on_signal, running.on_deadline = end, end
        for times in early:
            end(times)
        status = await process.wait()
    return status if status >= 0 else 128 - status


async def _close(running: Run, qmp: str, where: dict[str, Any]) -> Answer:
    from qmpcommit.recovery.doing import clear_overlays
    from qmpcommit.window.remains import unused

    async with running.connect(qmp) as vm:
        await tell_of_held(vm, qmp)
        left = await vm.windows()
        folder = where["overlay"]
        running.so_far = f"what had been begun was brought to its end; {_shown(qmp)}"
        others_left = await clear_overlays(vm, where["agents"])
        cleared = await unused(vm, () if folder is None else (folder,))
        outcomes = await vm.close_windows(**where)
        there = await unused(vm, () if folder is None else (folder,)) if cleared else ()
        others = [each for each in cleared if each in there]  # who opens a window just now lives
    cleared = [each for each in cleared if each not in others]
    cleared += [each.what for each in others_left]
    data = {
        "closed": [each.model_dump() for each in left],
        "cleared": cleared,
        "outcomes": [outcome.model_dump(mode="json") for outcome in outcomes],
    }
    said = [f"closed the window on {each.filename}" for each in left]
    said += [f"cleared away what was left of a window: {each}" for each in cleared]
    said += [f"left to whoever opened that window, who is alive: {each}" for each in others]
    said = said or ["no window was open, and nothing was left of one"]
    return Answer(data, "\n".join([*said, *remarks(outcomes)]), quiet=running.options.quiet)


@click.command(cls=Command)
@click.argument("qmp", shell_complete=complete_monitor)
@click.argument("disk", shell_complete=complete_disk)
@click.option("--keep", type=int, required=True, help="How many layers are to be left.")
@click.option("--delete", is_flag=True, help="Delete the files that were merged away.")
@click.option("--bandwidth", metavar="RATE", help="Bytes per second at most.")
@click.option(
    "--keep-relative",
    is_flag=True,
    help="Make absolute backing names relative (relative ones stay so in any case).",
)
@override_option
@progress_option
@common
def flatten(
    qmp: str,
    disk: str,
    *,
    keep: int,
    delete: bool,
    bandwidth: str | None,
    keep_relative: bool,
    override: tuple[str, ...],
    **given: Any,
) -> Answer:
    """Bring a long chain down to so many layers, from the bottom up, while the guest runs.

    Each step leaves a valid chain: it may be interrupted, and run again.
    """
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    asked: dict[str, Any] = {
        "keep": keep,
        "delete": delete,
        "bandwidth": bandwidth,
        "keep_relative": keep_relative,
        "override": override,
    }
    return run(options, lambda running: _flatten(running, qmp, disk, asked))


async def _flatten(running: Run, qmp: str, disk: str, asked: dict[str, Any]) -> Answer:
    import asyncio

    from qmpcommit.cli.bar import Bar
    from qmpcommit.cli.following import OwnCommits

    outcomes: list[CommitOutcome] = []
    now_called = disk
    vm = running.connect(qmp)
    commits = OwnCommits(running, [vm])
    try:
        async with vm:
            await tell_of_held(vm, qmp, [disk])
            async with Bar(running.options, qmp).of_all([vm]):
                async for outcome in vm.flatten(disk, **asked):
                    outcomes.append(outcome)
                    if outcome.action == "pivot" and outcome.active is not None:
                        now_called = outcome.active.filename
            now = await vm.disk(now_called)
    except asyncio.CancelledError:
        many = "1 layer was" if len(outcomes) == 1 else f"{len(outcomes)} layers were"
        said = f"{many} merged, and the chain is valid: run it again to go on"
        dumped = [outcome.model_dump(mode="json") for outcome in outcomes]
        raise commits.error(said, vm=vm.name, disk=disk, outcomes=dumped) from None
    data = {
        "outcomes": [outcome.model_dump(mode="json") for outcome in outcomes],
        "chain": [image.model_dump(mode="json") for image in now.chain],
    }
    merged = sum(outcome.action != "abort" for outcome in outcomes)
    said = flattened_text(outcomes, now.chain)
    if merged < len(outcomes):
        said += "\n  The last step was aborted by another client; run it again to go on."
    return Answer(
        data,
        "\n".join([said, *remarks(outcomes)]),
        status=0 if merged == len(outcomes) else 3,
        quiet=running.options.quiet,
    )
