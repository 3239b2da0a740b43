"""The block-job tests on QEMUs of several ages, and the manual's table of what came of it.

``python -m tests.all_qemu FOLDER [PYTEST ARGUMENT ...]`` is what ``tests/run.sh --all-qemu`` runs;
FOLDER keeps the QEMUs that ``tests/other_qemus.sh`` unpacks. With ``--choice`` (``--other-qemu``)
the machine's own QEMU is left out, and on the others only what can differ there is run: what
`tests.choice` chooses.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.ground.qemu import Qemu

TOP = Path(__file__).parent.parent
BEGIN, END = "<!-- tested versions: begin -->", "<!-- tested versions: end -->"
SYSTEM = "system"
SUITES = {"bullseye": "5.2", "bookworm": "7.2", "trixie": "10.0", "sid": ""}
"""Debian's suites and their QEMU's version; the last one moves, and has the newest."""

TESTS = ("tests/real",)
GUEST = (
    "tests/guest/test_cycle.py",
    "tests/guest/test_guest.py::test_every_acknowledged_write_is_there_after_commits[drive-iothread]",
)
"""Under a real guest: a choice for the QEMUs on which nothing else of that is tested."""


@dataclass
class Tested:
    """One QEMU, and how the tests ended on it; `missing` says why there were none."""

    name: str
    version: str = ""
    missing: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    skips: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    log: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    flags: Sequence[str] = ()
    plugin: Sequence[str] = ()
    tests: Sequence[str] = TESTS + GUEST
    cache: tempfile.TemporaryDirectory[str] = field(default_factory=tempfile.TemporaryDirectory)

    def row(self) -> str:
        """Its line of the table."""
        if self.missing:
            return f"| {self.version or '?'} | {self.name} | not tested: {self.missing} | |"
        result = ", ".join(f"{n} {what}" for what, n in self.counts.items() if n)
        why = "; ".join(f"{n} × {reason}" for reason, n in self.skips.items())
        return f"| {self.version} | {self.name} | {result} | {why} |"


def version_of(qemu: Qemu) -> str:
    """``7.2.22``, or nothing where its storage daemon does not run."""
    if qemu.daemon is None or qemu.system is None:
        return ""
    done = subprocess.run([qemu.daemon, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+(?:\.\d+)+)", done.stdout)
    return found[1] if found else ""


def bring(folder: Path, suite: str) -> Tested:
    """Unpack a suite's QEMU."""
    made = Tested(f"Debian {suite}", SUITES[suite])
    script = TOP / "tests" / "other_qemus.sh"
    done = subprocess.run([script, folder, suite], capture_output=True, text=True, check=False)
    if done.returncode:
        made.missing = " ".join(done.stderr.split()) or "it could not be unpacked"
        return made
    made.version = version_of(Qemu.installed(folder / "bin", f"-{suite}"))
    if not made.version:
        made.missing = "its qemu-storage-daemon does not run here"
    return made


def count(made: Tested, report: Path) -> None:
    """Read pytest's report."""
    made.counts.update({"passed": 0, "skipped": 0, "failed": 0})
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            made.counts["failed"] += 1
            made.failures.append(name)
        elif skipped is not None:
            made.counts["skipped"] += 1
            made.skips[str(skipped.get("message"))] += 1
        else:
            made.counts["passed"] += 1


CHOICE = "--choice"
PLUGIN = ("-p", "tests.choice")


async def test(made: Tested, options: Sequence[str]) -> None:
    """Run the block-job tests on one QEMU."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = [
            *(sys.executable, *made.flags, "-m", "pytest", "-q", f"--junitxml={report}"),
            *("-o", "timeout=180", "-o", f"cache_dir={made.cache.name}"),
            *(*made.plugin, *(options or made.tests)),
        ]
        process = await asyncio.create_subprocess_exec(
            *pytest, cwd=TOP, env={**os.environ, **made.environment},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        made.log = output.decode(errors="replace")
        if report.exists():
            count(made, report)
        if process.returncode and not made.failures:
            made.failures.append(f"pytest ended with {process.returncode}")


async def test_again(made: Tested, options: Sequence[str]) -> None:
    """What has failed, with nothing beside it: some tests need a machine that is quick enough."""
    failed = len(made.failures)
    again = replace(made, counts=Counter(), skips=Counter(), failures=[], plugin=())
    await test(again, ["--last-failed", *(options or made.tests)])
    made.log, made.failures = made.log + again.log, again.failures
    left = len(again.failures)
    made.counts.update({"passed": failed - left, "failed": left - failed})


async def test_all(folder: Path, choice: bool, options: Sequence[str]) -> list[Tested]:
    """Every QEMU, all at once, for most tests wait; with a choice all but the machine's own."""
    once = ["-X", "dev"]  # asyncio's debug mode
    if "COVERAGE_FILE" in os.environ:
        once += ["-m", "coverage", "run", "--parallel-mode"]
    system = Tested("the machine's own", version_of(Qemu.installed()), flags=once, tests=TESTS)
    if not system.version:
        system.missing = "qemu-system-x86_64 or qemu-storage-daemon is not installed"

    async def one(suite: str) -> Tested:
        made = system if suite == SYSTEM else await asyncio.to_thread(bring, folder, suite)
        if made.missing:
            return made
        if choice:
            made.plugin, made.tests = PLUGIN, TESTS + GUEST[-1:]
        if suite != SYSTEM:
            made.environment["QMPCOMMIT_TEST_QEMU_FOLDER"] = str(folder / "bin")
            made.environment["QMPCOMMIT_TEST_QEMU_SUFFIX"] = f"-{suite}"
        print(f"testing on QEMU {made.version} ({made.name})", file=sys.stderr, flush=True)
        await test(made, options)
        return made

    own = re.sub(r"^(\d+\.\d+).*", r"\1", system.version)
    wanted = [suite for suite, version in SUITES.items() if version != own]
    if not choice:
        wanted.insert(0, SYSTEM)
    tested = await asyncio.gather(*map(one, wanted))
    for made in tested:
        if made.failures:
            await test_again(made, options)
    return sorted(tested, key=lambda made: [int(part) for part in made.version.split(".") if part])


def table(tested: Sequence[Tested]) -> str:
    """For the manual."""
    head = "| QEMU | from | the block-job tests | skipped, and why |\n|---|---|---|---|"
    return "\n".join([head, *(made.row() for made in tested)])


def summary(counts: Counter[str], seconds: float) -> str:
    """Of all QEMUs together, as pytest says it."""
    said = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    return f" {said or 'no tests ran'} in {seconds:.2f}s ".center(100, "=")


def write(text: str) -> None:
    """Put the table between the markers of its page."""
    page = TOP / "qmpcommit" / "manual" / "qemu.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    """Exit status 1 where a test failed."""
    folder, options = Path(sys.argv[1]).absolute(), sys.argv[2:]
    choice = CHOICE in options
    options = [option for option in options if option != CHOICE]
    began = time.monotonic()
    tested = asyncio.run(test_all(folder, choice, options))
    failed = [made for made in tested if made.failures]
    for made in failed:
        print(made.log)
    text = table(tested)
    print(text)
    for made in failed:
        print(f"QEMU {made.version} ({made.name}):", *made.failures, sep="\n  ")
    if not options and not choice:
        write(text)
    counts = Counter[str]()
    for made in tested:
        counts.update(made.counts)
    print(summary(counts, time.monotonic() - began))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
