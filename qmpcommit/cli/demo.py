"""``qmpcommit demo``: both decisions on throw-away chains of a real QEMU, with proof."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmpcommit.cli.options import Answer, Interrupted, Options, common
from qmpcommit.cli.sections import Command
from qmpcommit.cli.telling import echo

if TYPE_CHECKING:
    from qmpcommit.cli.demo_qemu import Chain, Programs
    from qmpcommit.cli.running import Run
    from qmpcommit.commit.outcome import CommitOutcome


@click.command(cls=Command)
@click.option("--storage-daemon", is_flag=True, help="Use qemu-storage-daemon.")
@click.option("--keep-files", is_flag=True, help="Leave the images, and say where.")
@common
def demo(storage_daemon: bool, keep_files: bool, **given: Any) -> Answer:
    """The main job on throw-away chains, start to end, with proof.

    Makes a base and an overlay, opens them in a real QEMU, writes to the disk all the time,
    commits and pivots, ends QEMU, and compares every byte of the disk with what was written.
    Then the same with a second chain, keeping the overlay. Takes a few seconds; QEMU and all
    files are gone afterwards.
    """
    options = Options.of(**given)
    from qmpcommit.cli.running import run

    return run(options, lambda running: Demo(running, storage_daemon, keep_files).show())


def _new_folder() -> Path:
    """A folder for the images, whose path leaves room for a socket's name."""
    folder = tempfile.mkdtemp(prefix="qmpcommit-demo-")
    if len(folder) > 80:  # a Unix socket's address has about a hundred bytes
        Path(folder).rmdir()
        folder = tempfile.mkdtemp(prefix="qmpcommit-demo-", dir="/tmp")
    for decision in ("pivot", "keep"):
        (Path(folder) / decision).mkdir()
    return Path(folder)


class Demo:
    """One showing."""

    def __init__(self, running: Run, storage_daemon: bool, keep_files: bool) -> None:
        self._running, self._daemon, self._keep_files = running, storage_daemon, keep_files
        self._begun = time.monotonic()
        self._steps: list[dict[str, Any]] = []
        self._console: Any = None
        if not (running.options.as_json or running.options.quiet) and sys.stdout.isatty():
            from rich.console import Console

            self._console = Console(highlight=False)

    async def show(self) -> Answer:
        """All of it."""
        from qmpcommit.cli.demo_qemu import Programs

        programs = Programs.find(storage_daemon=self._daemon)
        folder = _new_folder()
        left = f"the images are in {folder}" if self._keep_files else "its files are gone"
        try:
            outcomes = [
                await self._commit(programs, folder / decision, decision)
                for decision in ("pivot", "keep")
            ]
        except BaseException as error:
            if self._running.signals:
                raise Interrupted(f"interrupted; the demo's QEMU has ended, {left}") from error
            raise
        finally:
            if not self._keep_files:
                shutil.rmtree(folder, ignore_errors=True)
        if self._keep_files:
            self._step(left)
        proved = "proved: every byte of both disks is what was written, after a pivot and a keep"
        if self._console is not None:
            self._console.print(proved, style="bold green")
        data = {
            "proved": True,
            "qemu": programs.qemu,
            "seconds": round(time.monotonic() - self._begun, 3),
            "files": str(folder) if self._keep_files else None,
            "steps": self._steps,
            "outcomes": [outcome.model_dump(mode="json") for outcome in outcomes],
        }
        return Answer(data, proved, quiet=self._running.options.quiet, draw=lambda: None)

    async def _commit(self, programs: Programs, folder: Path, decision: str) -> CommitOutcome:
        """One chain, one commit, one proof."""
        from qmpcommit.cli import demo_qemu

        self._title(
            {
                "pivot": "Commit and pivot: the overlay goes into the base, which takes over",
                "keep": "Commit and keep: the base catches up, the overlay goes on",
            }[decision]
        )
        chain = await demo_qemu.make_chain(programs, folder)
        self._step("made base.qcow2 and overlay.qcow2, which has data partly over the base's")
        async with demo_qemu.qemu(programs, folder, chain) as monitor:
            self._step(f"started {Path(programs.qemu).name} with the chain as its disk")
            outcome, at_decision = await self._live(monitor, folder, chain, decision)
        self._step("ended QEMU, so that the files can be read")
        if decision == "pivot":
            await self._prove(programs, chain.base, chain.picture, "the base is the whole disk")
        else:
            await self._prove(
                programs, chain.base, at_decision, "the base is the disk as it was at the decision"
            )
            await self._prove(programs, chain.overlay, chain.picture, "the overlay is the disk now")
        return outcome

    async def _live(
        self, monitor: str, folder: Path, chain: Chain, decision: str
    ) -> tuple[CommitOutcome, bytes]:
        """The commit under a writer; its outcome, and the disk as it was at the decision."""
        from qmpcommit.cli.demo_qemu import DemoFailed
        from qmpcommit.cli.nbd_writer import NbdWriter
        from qmpcommit.commit.policy import Keep, Pivot, Ready

        nbd = str(folder / "nbd")
        picture_then = b""

        async def decide(ready: Ready) -> Pivot | Keep:
            nonlocal picture_then
            await writer.writes(50)
            self._step(f"READY after {writer.count} writes; the copy follows each new one")
            if decision == "pivot":
                return Pivot()
            await writer.pause()
            picture_then = bytes(chain.picture)
            return Keep()

        vm = self._running.connect(monitor)
        await vm.restore()  # its socket's file is there a moment before QEMU listens
        async with vm:
            address = {"type": "unix", "data": {"path": nbd}}
            await vm.execute("nbd-server-start", {"addr": address})
            export = {"type": "nbd", "id": "guest", "node-name": "overlay", "writable": True}
            await vm.execute("block-export-add", export)
            async with NbdWriter(nbd, "overlay", chain.picture) as writer:
                await writer.writes(50)
                self._step("a writer stands in for the guest and does not stop")
                disk = (await vm.disks())[0].name
                job = await vm.commit(disk, policy=decide, timeout=self._running.remaining)
                self._step(f"sent block-commit for {disk}")
                outcome = await job.wait()
                if decision == "keep":
                    writer.resume()
                await writer.writes(50)
                self._step(f"{decision}: {self._said(outcome)}; {writer.count} writes so far")
            await vm.execute("quit")
        if outcome.action != decision:
            raise DemoFailed(f"QEMU did '{outcome.action}', and '{decision}' was asked")
        return outcome, picture_then

    def _said(self, outcome: CommitOutcome) -> str:
        now = Path(outcome.active.filename).name if outcome.active else "?"
        text = f"QEMU's block graph shows {now} as the disk now"
        if outcome.invalidated:
            names = ", ".join(Path(name).name for name in outcome.invalidated)
            text += f", and {names} is never to be booted again"
        return text

    async def _prove(
        self, programs: Programs, path: Path, picture: bytes | bytearray, claim: str
    ) -> None:
        from qmpcommit.cli.demo_qemu import DemoFailed, compare
        from qmpcommit.units import show_size

        place = await compare(programs, path, picture)
        if place is not None:
            raise DemoFailed(f"NOT proved that {claim}: {path.name} differs at byte {place}")
        self._step(f"read {path.name}: all {show_size(len(picture))} agree, {claim}")

    # -- what is seen of it -----------------------------------------------------------------------

    def _title(self, text: str) -> None:
        self._write(text, text, "bold")

    def _step(self, text: str) -> None:
        seconds = time.monotonic() - self._begun
        self._steps.append({"seconds": round(seconds, 3), "step": text})
        self._write(f"  {seconds:5.2f} s  {text}", f"  [{seconds:5.2f} s] {text}", "")

    def _write(self, plain: str, drawn: str, style: str) -> None:
        if self._console is not None:
            self._console.print(drawn, style=style, markup=False)
        elif not (self._running.options.as_json or self._running.options.quiet):
            echo(plain)
