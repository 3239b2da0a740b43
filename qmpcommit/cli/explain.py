"""``qmpcommit explain``: what a story does to the files of a disk, drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from qmpcommit.cli.completing import complete_disk, complete_monitor
from qmpcommit.cli.options import Answer, Options, common
from qmpcommit.cli.sections import Command

if TYPE_CHECKING:
    from qmpcommit.cli.running import Run

STORIES = ("pivot", "keep", "recycle", "abort", "snapshot", "window", "cycle", "group")

_OVER_ANY = ("snapshot", "window")
"""The stories that lay an overlay."""

USUAL = ("base.qcow2", "disk.qcow2")
"""The files, bottom first, where no disk is named."""


class Stage(NamedTuple):
    """One moment: its name, the chain of files (bottom first), and what is to be known."""

    when: str
    chain: tuple[str, ...]
    note: str
    copies: bool = False
    guest: bool = True


@click.command(cls=Command)
@click.argument("story", type=click.Choice(STORIES), metavar="STORY")
@click.argument("qmp", shell_complete=complete_monitor, required=False)
@click.argument("disks", shell_complete=complete_disk, nargs=-1, metavar="[DISK]...")
@common
def explain(story: str, qmp: str | None, disks: tuple[str, ...], **given: Any) -> Answer:
    """Draw what a story does to the files.

    STORY is pivot, keep, recycle, abort, snapshot, window, cycle or group.

    With QMP and a DISK (of a group, all of them) it is drawn with that disk's own files, as they
    are now. Nothing is sent that changes anything.
    """
    options = Options.of(**given)
    if qmp is None:
        names = ["vda", "vdb"] if story == "group" else [""]
        usual = [[f"{name}-{file}" if name else file for file in USUAL] for name in names]
        return _answer(options, story, list(zip(names, usual, strict=True)))
    if not disks or (len(disks) > 1 and story != "group"):
        raise click.UsageError("Give QMP and its DISK, or neither; several DISKs for a group")
    from qmpcommit.cli.running import run

    return run(options, lambda running: _explain(running, story, qmp, disks))


async def _explain(running: Run, story: str, qmp: str, disks: Sequence[str]) -> Answer:
    from qmpcommit.commit.policy import Keep

    found = []
    async with running.vm(qmp) as vm:
        for name in disks:
            if story not in _OVER_ANY:  # else a disk without an overlay is right as well
                await vm.plan(disk=name, policy=Keep(), base=1 if story == "cycle" else None)
            disk = await vm.disk(name)
            found.append((disk.name, [image.filename for image in reversed(disk.chain)]))
    return _answer(running.options, story, found)


def _answer(options: Options, story: str, disks: list[tuple[str, list[str]]]) -> Answer:
    drawn = []
    lines: list[str] = []
    for disk, files in disks:
        short = _short(files)
        stages = list(_stages(story, short))
        drawn.append({"disk": disk, "files": files, "stages": [each._asdict() for each in stages]})
        if disk:
            lines.append(f"{disk}:")
        lines += [line for each in stages for line in _lines(each)]
        lines += [f"  {a} is {b}" for a, b in zip(short, files, strict=True) if a != b]
    return Answer({"story": story, "disks": drawn}, "\n".join(lines), quiet=options.quiet)


def drawn(story: str, files: Sequence[str]) -> list[str]:
    """What a story does to these files (bottom first), line by line."""
    return [line for stage in _stages(story, _short(files)) for line in _lines(stage)]


def last_note(story: str, files: Sequence[str]) -> str:
    """What is to be known of these files in the end."""
    return list(_stages(story, _short(files)))[-1].note


def _short(files: Sequence[str]) -> list[str]:
    """The names without their folders, where these tell the files apart."""
    short = [os.path.basename(file) or file for file in files]
    return short if len(set(short)) == len(short) else list(files)


def _lines(stage: Stage) -> Iterator[str]:
    *below, top = stage.chain
    arrow = " ◀══ " if stage.copies else " ◀── "
    drawn = " ◀── ".join(below) + (arrow if below else "") + top
    yield f"  {stage.when:<9}  {drawn}{' ◀── guest' if stage.guest else ''}"
    yield f"  {'':<9}  {stage.note}"


def _stages(story: str, files: Sequence[str]) -> Iterator[Stage]:
    """What happens, moment by moment."""
    chain = tuple(files)
    *below, top = chain
    if story == "window":
        yield Stage("before", chain, f"the guest writes to {top}")
        yield Stage("in it", (*chain, "OVERLAY"), f"{top} stands still, and can be read")
        yield Stage("closing", (*chain, "OVERLAY"), f"OVERLAY is committed into {top}", copies=True)
        yield Stage("after", chain, f"the guest writes to {top}; OVERLAY is deleted")
        return
    if story == "snapshot":
        still = f"{top} does not change any more, until OVERLAY is committed"
        yield Stage("before", chain, f"the guest writes to {top}")
        yield Stage(
            "after", (*chain, "OVERLAY"), f"the guest writes to OVERLAY, which stays; {still}"
        )
        return
    base = below[-1] if story == "cycle" else below[0]
    under = tuple(below) if story == "cycle" else (base,)
    stale = " and ".join([top] if story == "cycle" else [top, *reversed(below[1:])])
    never = f"{stale} {'are' if ' and ' in stale else 'is'} stale: never boot it again"
    copied = f"all that {stale} {'hold' if ' and ' in stale else 'holds'} is copied into {base}"
    yield Stage("before", chain, f"the guest writes to {top}")
    if story == "cycle":
        yield Stage("asked", chain, "CMD says whether the changes are good")
        yield Stage("good", chain, copied, copies=True)
        yield Stage("after it", (*under, "FRESH"), f"{base} has the changes; {never}")
        yield Stage("bad", (*chain, "FRESH"), "the guest stands still", guest=False)
        as_it_was = f"{base} is as it was; {never}; the guest is reset, or left stopped"
        yield Stage("after it", (*under, "FRESH"), as_it_was)
        return
    yield Stage("copying", chain, copied, copies=True)
    if story == "abort":
        yield Stage("after", chain, f"{base} holds a part: it is valid only under {top}")
        return
    yield Stage("READY", chain, "every write goes to both, until it is decided", copies=True)
    if story == "group":
        held = "all disks' I/O waits, for milliseconds: all bases show this instant"
        yield Stage("held", chain, held, guest=False)
    yield {
        "keep": Stage("after", chain, f"{base} has all until the decision; {top} stays full"),
        "recycle": Stage("after", (base, "FRESH"), f"FRESH is empty; {never}"),
    }.get(story, Stage("after", (base,), f"the guest writes to {base}; {never}"))
