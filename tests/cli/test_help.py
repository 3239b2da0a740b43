"""What answers at once: help and version; and what a commit does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qmpcommit import __version__
from qmpcommit.cli.commands import COMMANDS
from tests.cli.command import COMMAND, ENVIRONMENT, ROOT, qmpcommit
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import machine

ALONE = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from qmpcommit.__main__ import main; main()"
)
HEAVY = {"asyncio", "pydantic", "qemu.qmp", "rich", "structlog"}


def imported(*words: str) -> set[str]:
    """The modules that a run of the command imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *COMMAND[1:], *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 10
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert not imported(*words) & HEAVY


def test_a_usage_error_imports_nothing_heavy() -> None:
    assert not imported("commit", "--json") & HEAVY


async def test_a_quiet_commit_imports_no_pydantic_structlog_or_rich(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        seen = imported("commit", qemu.qmp, "vda", "--pivot", "--json")
        assert "qemu.qmp" in seen
        assert not seen & {"pydantic", "structlog", "rich"}
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])


def test_version() -> None:
    said = qmpcommit("--version")
    assert (said.status, said.out, said.err) == (0, f"qmpcommit {__version__}\n", "")


def alone(*words: str) -> subprocess.CompletedProcess[str]:
    """The package with nothing else installed, not even what it needs."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", ALONE, str(ROOT), *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_with_nothing_else_installed() -> None:
    said = alone("--version")
    assert (said.returncode, said.stdout, said.stderr) == (0, f"qmpcommit {__version__}\n", "")
    for word in ("--help", "-h"):
        said = alone(word)
        assert (said.returncode, said.stderr) == (0, "")
        assert all(f"  {name} " in said.stdout for name in COMMANDS)
        assert "130" in said.stdout
    said = alone("chain", "/nowhere", "--json")
    assert (said.returncode, said.stdout) == (1, "")
    installs = "pip install 'qmpcommit[cli]'"
    assert said.stderr == f"qmpcommit: the package click is not installed: {installs}\n"


@pytest.mark.parametrize(
    "start",
    [["-m", "qmpcommit"], ["-c", "from qmpcommit.cli.daemon import main; main()"]],
    ids=["as a module", "the daemon"],
)
def test_the_version_is_told_whatever_is_started(start: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *start, "--version"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        check=True,
    )
    assert done.stdout == qmpcommit("--version").out


def test_the_list_of_commands() -> None:
    said = qmpcommit("--help")
    assert said.status == 0
    for name in COMMANDS:
        assert f"  {name} " in said.out
    assert "130" in said.out  # the table of exit statuses


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options_and_says_what_it_does(name: str) -> None:
    said = qmpcommit(name, "--help")
    assert said.status == 0
    for option in ("--json", "--quiet", "--timeout S", "--verbose", "--help"):
        assert option in said.out
    assert len(said.out.split("Options:")[0].splitlines()) > 3


def test_the_commits_options() -> None:
    said = qmpcommit("commit", "--help")
    for option in (
        *("--pivot", "--keep-overlay", "--abort", "--hold [SECONDS]", "--check CMD"),
        *("--policy JSON", "--only-if CMD", "--base B", "--top T", "--shallow", "--bandwidth"),
    ):
        assert option in said.out
