"""The screen of ``top``: a row a job, what is left of it plotted, and keys; needs Textual."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.coordinate import Coordinate
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Input, Static

from qmpcommit.callback import said_of
from qmpcommit.cli.show import phase_text, ready_text, show_seconds
from qmpcommit.cli.vms import paces_of
from qmpcommit.commit.rates import JobPace, Rates, percent
from qmpcommit.errors import QmpCommitError
from qmpcommit.recovery.host import JobState, VMState
from qmpcommit.units import counted, parse_size, show_size

if TYPE_CHECKING:
    from qmpcommit.cli.sources import Source

HEADS = ("VM", "DISK", "DEPTH", "JOB", "PHASE", "DONE", "%", "RATE", "ETA", "READY FOR")

WIDTH = 16
"""Of a bar, in columns."""

PLOT = 5
"""Lines that a plot has."""

KEPT = 600
"""Looks that a plot remembers."""

GOING_ON = ("paused", "standby")


class Line(NamedTuple):
    """What a row is about: a job, or a VM that has none."""

    vm: VMState
    job: JobState | None = None
    pace: JobPace = JobPace()

    @property
    def key(self) -> str:
        """What stays the same from look to look."""
        return f"{self.vm.address} {self.job.id if self.job else ''}"

    @property
    def name(self) -> str:
        """What a person calls the VM."""
        return self.vm.name or self.vm.address


class Question(ModalScreen[bool]):
    """Asks whether something is to be done: ``y`` does it, anything else leaves it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes"),
        Binding("n,escape,enter,q", "answer(False)", "no"),
    ]
    CSS = """
    Question { align: center middle; }
    Question Static { width: 70; border: thick $accent; padding: 1 2; }
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def compose(self) -> ComposeResult:
        """One box."""
        yield Static(Text(f"{self.text}\n\ny for yes, n for no"), id="question")

    def action_answer(self, yes: bool) -> None:
        """It was answered."""
        self.dismiss(yes)


class Asked(ModalScreen[str]):
    """Asks for a speed; "" for none."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "leave it")]
    CSS = """
    Asked { align: center middle; }
    Asked Vertical { width: 60; height: auto; border: thick $accent; padding: 1 2; }
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def compose(self) -> ComposeResult:
        """A line to type in."""
        with Vertical():
            yield Static(Text(self.text))
            yield Input(placeholder="50MiB, or max", id="speed")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """It was typed."""
        self.dismiss(event.value.strip())

    def action_leave(self) -> None:
        """Nothing is to be changed."""
        self.dismiss("")


class Live(App[None]):
    """The VMs of a source, looked at again and again."""

    TITLE = "qmpcommit top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "end('pivot')", "pivot"),
        Binding("k", "end('keep')", "keep"),
        Binding("a", "end('abort')", "abort"),
        Binding("space", "pause", "pause/resume"),
        Binding("s", "speed", "speed"),
        Binding("q,ctrl+c", "quit", "quit"),
    ]
    CSS = """
    DataTable { height: 1fr; }
    #about { height: auto; max-height: 8; padding: 0 1; }
    #plot { height: auto; padding: 0 1; color: $accent; }
    #said { height: auto; padding: 0 1; color: $warning; }
    """

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._rates = Rates()
        self._lines: dict[str, Line] = {}
        self._left: dict[str, deque[float]] = {}

    def compose(self) -> ComposeResult:
        """A table, what is known of its row, and a plot."""
        table: DataTable[Text] = DataTable(cursor_type="row", zebra_stripes=True)
        yield table
        yield Static(id="about")
        yield Static(id="plot")
        yield Static("looking ...", id="said")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self.table.add_columns(*HEADS)
        self.run_worker(self._follow(), exit_on_error=False)

    @property
    def table(self) -> DataTable[Text]:
        """The table."""
        return self.query_one(DataTable)

    async def _follow(self) -> None:
        while True:
            try:
                found = await self._source.look()
            except Exception as error:  # a bug too: else the screen stands still without a word
                self.say(said_of(error))
            else:
                self._show(found)
            await asyncio.sleep(self._source.every)

    def say(self, text: str) -> None:
        """What has come of something."""
        self.query_one("#said", Static).update(Text(text))

    # -- what is shown ----------------------------------------------------------------------------

    def _show(self, found: list[VMState]) -> None:
        paces = paces_of(found, self._rates)
        lines = {line.key: line for vm in found for line in _lines(vm, paces)}
        for key, line in lines.items():
            if line.job is not None:
                left = self._left.setdefault(key, deque(maxlen=KEPT))
                left.append(float(max(0, line.job.total - line.job.current)))
        self._left = {key: left for key, left in self._left.items() if key in lines}
        table, before, former = self.table, self.chosen, list(self._lines)
        self._lines = lines
        if list(lines) != former:
            table.clear()
            for key, line in lines.items():
                table.add_row(*map(Text, _cells(line)), key=key)
            if before is not None and before.key in lines:
                table.move_cursor(row=list(lines).index(before.key))
        else:
            for row, line in enumerate(lines.values()):
                for column, cell in enumerate(_cells(line)):
                    table.update_cell_at(Coordinate(row, column), Text(cell), update_width=True)
        self._about()
        at = time.strftime("%H:%M:%S")
        self.say(f"{counted(len(found), 'VM')} at {at}" if found else f"no VM was found, at {at}")

    @property
    def chosen(self) -> Line | None:
        """What the cursor is on."""
        lines = list(self._lines.values())
        row = self.table.cursor_row
        return lines[row] if 0 <= row < len(lines) else None

    def on_data_table_row_highlighted(self) -> None:
        """The cursor was moved."""
        self._about()

    def _about(self) -> None:
        line = self.chosen
        text = "" if line is None else "\n".join(_about(line))
        self.query_one("#about", Static).update(Text(text))
        left = self._left.get(line.key, ()) if line is not None else ()
        drawn = plot(list(left), max(10, self.size.width - 2), PLOT) if left else []
        self.query_one("#plot", Static).update(Text("\n".join(drawn), no_wrap=True))

    # -- what is done -----------------------------------------------------------------------------

    def action_end(self, choice: str) -> None:
        """Ask whether the job is to be ended so."""
        line = self._with_job()
        if line is None or line.job is None:
            return
        disk = next((each for each in line.vm.disks if each.name == line.job.disk), None)
        overlay = (disk.overlay if disk else "") or "the overlay"
        does = {
            "pivot": f"Its base becomes the active image. {overlay} is stale then: never boot it"
            " again",
            "keep": f"{overlay} stays the active image, and the base has all until now",
            "abort": f"{overlay} stays the active image. The base holds a part, and is valid only"
            " under it",
        }[choice]
        self._ask(
            line, f"{choice} {line.job.id} on {line.job.disk} of {line.name}? {does}.", choice
        )

    def action_pause(self) -> None:
        """Ask whether the job is to be paused, or is to go on."""
        line = self._with_job()
        if line is not None and line.job is not None:
            order = "resume" if line.job.status in GOING_ON else "pause"
            self._ask(line, f"{order} {line.job.id} on {line.job.disk} of {line.name}?", order)

    def action_speed(self) -> None:
        """Ask for the job's new speed."""
        line = self._with_job()
        if line is None or line.job is None:
            return
        limit = f"{show_size(line.job.speed)}/s" if line.job.speed else "no limit"
        text = f"At most how many bytes per second for {line.job.id}? It has {limit}."

        def typed(word: str | None) -> None:
            if not word:
                return
            try:
                rate = 0 if word == "max" else parse_size(word, "speed")
            except QmpCommitError as error:
                self.say(error.message)
                return
            self.run_worker(self._order(line, "speed", rate), exit_on_error=False)

        self.push_screen(Asked(text), typed)

    def _with_job(self) -> Line | None:
        line = self.chosen
        if line is None or line.job is None:
            self.say("there is no job on this row")
            return None
        return line

    def _ask(self, line: Line, text: str, order: str) -> None:
        def answered(yes: bool | None) -> None:
            if yes:
                self.run_worker(self._order(line, order), exit_on_error=False)

        self.push_screen(Question(text), answered)

    async def _order(self, line: Line, order: str, rate: int = 0) -> None:
        assert line.job is not None
        try:
            said = await self._source.order(line.vm, line.job, order, rate)
        except Exception as error:  # likewise
            self.notify(said_of(error), severity="error", markup=False, timeout=20)
        else:
            warned = "\n" in said  # a line for each warning
            severity: Literal["warning", "information"] = "warning" if warned else "information"
            self.notify(said, severity=severity, markup=False, timeout=20 if warned else None)


def _lines(vm: VMState, paces: dict[tuple[str, str], JobPace]) -> Iterator[Line]:
    for job in vm.jobs:
        yield Line(vm, job, paces[vm.address, job.id])
    if not vm.jobs:
        yield Line(vm)


def _cells(line: Line) -> list[str]:
    vm, job, pace = line.vm, line.job, line.pace
    if job is None:
        state = vm.status or ("no guest" if vm.asked else "not asked")
        disks = ", ".join(each.name for each in vm.disks)
        depths = ", ".join(str(each.depth) for each in vm.disks)
        return [line.name, disks, depths, "-", state, "", "", "", "", ""]
    depth = next((str(each.depth) for each in vm.disks if each.name == job.disk), "")
    done = percent(job.current, job.total, job.status)
    full = round(WIDTH * (done or 0) / 100)
    ready = "" if pace.ready_for is None else ready_text(pace.ready_for, pace.ready_bound)
    copies = job.status == "running"
    return [
        line.name,
        job.disk,
        depth,
        job.type,
        phase_text(job.status),
        "█" * full + "░" * (WIDTH - full),
        "" if done is None else f"{done:g}",
        f"{show_size(pace.rate)}/s" if copies and pace.rate is not None else "",
        show_seconds(pace.eta) if copies and pace.eta is not None else "",
        ready,
    ]


def plot(values: Sequence[float], width: int, height: int) -> list[str]:
    """What was left at each look, from nothing to the most that it was, the newest at the right."""
    if len(values) > width:  # many looks are one column
        step = len(values) / width
        values = [values[int((place + 1) * step) - 1] for place in range(width)]
    most = max(values) or 1.0
    full = [max(value > 0, round(8 * height * value / most)) for value in values]
    return [
        "".join(" ▁▂▃▄▅▆▇█"[min(8, max(0, each - 8 * row))] for each in full).rstrip()
        for row in reversed(range(height))
    ]


def _about(line: Line) -> Iterator[str]:
    """What stands below the table."""
    vm, job = line.vm, line.job
    yield f"{line.name}, {vm.address}"
    for disk in vm.disks:
        if disk.overlay and (job is None or disk.name == job.disk):
            size = "" if disk.overlay_size is None else f", {show_size(disk.overlay_size)}"
            yield f"{disk.name}: {disk.depth} layers, writes to {disk.overlay}{size}"
    yield from (f"WARNING: {each}" for each in vm.wrong)
    if job is not None:
        limit = f", at most {show_size(job.speed)}/s" if job.speed else ""
        yield f"{job.id}{limit}: {show_size(max(0, job.total - job.current))} are left:"
