"""The tests, shared out among several pytests at once: most of them wait more than they compute.

``python -m tests.crew NUMBER [PYTHON FLAG ...] -- [PYTEST ARGUMENT ...]`` is what
``tests/run.sh --at-once NUMBER`` runs. Each pytest collects all the tests and runs those that it
is the first to claim; as a plugin (``-p tests.crew``) this module is what has it claim. What has
failed is run once more at the end, with nothing beside it: some tests need a machine that is quick
enough.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
FOLDER = "QMPCOMMIT_TEST_CREW"
"""Names the folder in which a crew notes what is claimed, and how each test ended."""

PATIENCE = ("-o", "timeout=180")
"""For a test that sets no limit of its own: others run beside it."""

SLOWEST = ("--durations=20", "--durations-min=10")
"""Told of each pytest: where the time goes."""

TOLD_EACH = 60.0
"""Seconds."""

USED_WRONGLY = (2, 3, 4)
"""Pytest's exit statuses where it could not run what was asked for. 5 is one that claimed nothing;
where one was killed, what it had claimed counts as failed."""

ENDS = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


class Claiming:
    """One pytest of a crew."""

    def __init__(self, folder: Path) -> None:
        self._claims = folder / "claims"
        self._ends = folder / f"ends.{os.getpid()}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Long ones first, so that nobody waits for one that began last."""
        items.sort(key=lambda item: -_limit(item))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run what nobody else has claimed."""
        if session.testsfailed or session.config.option.collectonly:
            return None  # pytest says what is to be said of it
        mine = self._mine(session.items)
        item = next(mine, None)
        while item is not None:
            following = next(mine, None)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            item = following
        return True

    def _mine(self, items: Sequence[pytest.Item]) -> Iterator[pytest.Item]:
        for item in items:
            name = hashlib.sha256(item.nodeid.encode()).hexdigest()
            try:
                with (self._claims / name).open("x") as file:
                    file.write(item.nodeid)
            except FileExistsError:
                continue
            yield item

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how it ended."""
        if report.failed:
            end = "failed" if report.when == "call" else "error"
        elif report.skipped:
            end = "xfailed" if hasattr(report, "wasxfail") else "skipped"
        elif report.when == "call":
            end = "xpassed" if hasattr(report, "wasxfail") else "passed"
        else:
            return
        with self._ends.open("a") as file:
            file.write(f"{end} {report.nodeid}\n")


def _limit(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0]) if mark is not None and mark.args else 0.0


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin, in each pytest of a crew."""
    if folder := os.environ.get(FOLDER):
        config.pluginmanager.register(Claiming(Path(folder)))


class Crew:
    """Some pytests, and what came of the tests that they shared."""

    def __init__(self, flags: Sequence[str], options: Sequence[str]) -> None:
        self._flags, self._options = flags, options
        self.ends: dict[str, str] = {}
        self.broken: list[str] = []

    def work(self, number: int, options: Sequence[str] = ()) -> None:
        """Run the tests by so many pytests at once, and print what each of them said."""
        with tempfile.TemporaryDirectory(prefix="qc-crew-") as name:
            folder = Path(name)
            (folder / "claims").mkdir()
            working = [self._start(folder, n, options) for n in range(number)]
            try:
                statuses = [self._wait(process, folder) for process in working]
            finally:
                for said in sorted(folder.glob("said.*")):
                    print(said.read_text(errors="replace"), flush=True)
            self._count(folder)
            wrong = {status for status in statuses if status in USED_WRONGLY}
            self.broken = [f"a pytest ended with status {status}" for status in sorted(wrong)]

    def _wait(self, process: subprocess.Popen[bytes], folder: Path) -> int:
        """Until it has ended; says now and then how far all are."""
        while True:
            try:
                return process.wait(TOLD_EACH)
            except subprocess.TimeoutExpired:
                ends = [line for path in folder.glob("ends.*") for line in _lines(path)]
                failed = [line for line in ends if line.startswith(("failed", "error"))]
                print(f"{len(ends)} ended", *failed, sep="; ", flush=True)

    def _start(self, folder: Path, n: int, options: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, *self._flags, "-m", "pytest", "-q", "-p", "tests.crew"]
        command += [*PATIENCE, *SLOWEST, "-p", "no:cacheprovider", *self._options, *options]
        with (folder / f"said.{n}").open("wb") as said:
            return subprocess.Popen(
                command, cwd=TOP, env={**os.environ, FOLDER: str(folder.absolute())},
                stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _count(self, folder: Path) -> None:
        # What was claimed and has no end was lost with the pytest that ran it.
        found = {claim.read_text(): "failed" for claim in (folder / "claims").iterdir()}
        ended: dict[str, str] = {}
        for ends in sorted(folder.glob("ends.*")):
            for line in _lines(ends):
                end, test = line.split(" ", 1)
                if ended.get(test) not in ("failed", "error"):
                    ended[test] = end
        self.ends.update(found | ended)

    @property
    def failed(self) -> list[str]:
        """The tests that failed the last time."""
        return [test for test, end in self.ends.items() if end in ("failed", "error")]

    def again(self) -> None:
        """What has failed, alone."""
        failed = self.failed
        print(f"once more, with nothing beside them: {len(failed)} that failed", flush=True)
        options = [option for option in self._options if not _names_tests(option)]
        alone = Crew(self._flags, options)
        alone.work(1, failed)
        self.broken += alone.broken
        self.ends.update(alone.ends)

    def summary(self, seconds: float) -> str:
        """As pytest says it."""
        counts = Counter(self.ends.values())
        said = [f"{counts[end]} {end}" for end in ENDS if counts[end]]
        lines = [f"FAILED {test}" for test in self.failed] + [f"ERROR {why}" for why in self.broken]
        line = f" {', '.join(said) or 'no tests ran'} in {seconds:.2f}s "
        return "\n".join([*lines, line.center(100, "=")])


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def _names_tests(option: str) -> bool:
    return not option.startswith("-") and (TOP / option.partition("::")[0]).exists()


def main() -> int:
    """Exit status 1 where a test failed twice, or nothing was run."""
    number, *rest = sys.argv[1:]
    cut = rest.index("--")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was said so far is printed
    began = time.monotonic()
    crew = Crew(rest[:cut], rest[cut + 1 :])
    crew.work(int(number))
    if crew.failed:
        crew.again()
    print(crew.summary(time.monotonic() - began))
    return 1 if crew.failed or crew.broken or not crew.ends else 0


if __name__ == "__main__":
    sys.exit(main())
