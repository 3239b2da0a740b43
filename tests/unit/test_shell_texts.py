"""What the command may say holds no Python, for who reads it types no Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import qmpcommit
from qmpcommit.callback import said_of
from qmpcommit.client.http import Lost
from qmpcommit.errors import CommitFailed
from tests.cli.command import qmpcommit as run

PACKAGE = Path(qmpcommit.__file__).parent
PYTHON = re.compile(
    r"\b(Pivot|Keep|Abort|Hold|Check|Recycle)\(|\[Errno|[a-z_]+=['\"]|Failed\(|\bqc\.[a-z]"
)

VERBS = (
    "abort|chain|commit|completion|cycle|daemon|demo|doctor|explain|flatten|help|jobs|keep|pause"
    "|pivot|recover|resume|snapshot|speed|top|ui|vms|wait|window"
)
COMMAND = re.compile(rf"\bqmpcommit ({VERBS})\b|(?<![\w-])--[a-z]")

LIBRARY_ALONE = {
    "cli/relay.py": 1,  # HTML, whose attributes look the same
    "commit/policy.py": 3,  # what is no policy, answers with none, or was not given
    "commit/request.py": 1,  # a policy of one's own, for the daemon
    "commit/ledger.py": 1,  # what a ledger holds
    "guest/hold.py": 2,  # a freeze without its agents; the command counts them itself
    "wire/window.py": 1,  # the same of the daemon's API
}
"""How many texts of a file with Python in them only a caller of the library can meet."""


FOR_PEOPLE = {
    "block/throttle.py": 1,  # an option of QEMU's
    "commit/checks/layers.py": 1,  # one of qemu-img's
    "commit/pending.py": 1,
    "commit/recycle.py": 1,
    "guest/marks.py": 2,
    "recovery/jobs.py": 3,
    "recovery/lookup.py": 2,
    "recovery/monitors.py": 1,
    "recovery/overlays.py": 1,
    "recovery/verdict.py": 5,
}
"""How many texts of a file tell what a person types, and are no message of an error.

They are told apart from what is the matter: as a finding's ``next``, or put into a `hint`.
"""


def hints(tree: ast.AST) -> set[int]:
    """The nodes of what is a `hint`, or is about to be one."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "hint":
            found.append(node.value)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [each for t in targets for each in ast.walk(t) if isinstance(each, ast.Name)]
            if any(name.id.lower().endswith("hint") for name in names):
                found.append(node.value)
    return {id(each) for node in found for each in ast.walk(node)}


def texts(file: Path, *, hinted: bool = True) -> Iterator[str]:
    """The strings of a file that are no docstrings, comments or keys; without hints if asked."""
    tree = ast.parse(file.read_text())
    skipped = set() if hinted else hints(tree)
    bare = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and id(node) not in bare | skipped:
            yield text


def test_no_text_of_the_package_holds_python() -> None:
    found: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        place = str(file.relative_to(PACKAGE))
        if place.startswith("daemon/"):
            continue  # its texts go to programs and to a log
        for text in texts(file):
            if PYTHON.search(text):
                found.setdefault(place, []).append(text)
    assert {place: len(of) for place, of in found.items()} == LIBRARY_ALONE, found


def test_no_message_of_the_library_names_a_command() -> None:
    """Whoever embeds it holds the only monitor; what a person types is the error's `hint`."""
    found: dict[str, list[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        place = str(file.relative_to(PACKAGE))
        if place.startswith(("cli/", "daemon/", "manual/")) or place == "__main__.py":
            continue
        for text in texts(file, hinted=False):
            if COMMAND.search(text) and not text.startswith("--"):  # else an argument of a process
                found.setdefault(place, []).append(text)
    assert {place: len(of) for place, of in found.items()} == FOR_PEOPLE, found


def test_errors_are_told_in_words() -> None:
    gone = FileNotFoundError(2, "No such file or directory", "/x")
    assert said_of(gone) == "/x: No such file or directory"
    assert said_of(OSError(5, "Input/output error")) == "Input/output error"
    assert said_of(CommitFailed("no room")) == "no room"
    assert said_of(ValueError("three")) == "ValueError('three')"  # a program's own
    assert str(Lost(gone, connected=False)) == "No such file or directory"


def test_the_command_speaks_to_people() -> None:
    for words in (
        ["commit", "/x", "vda"],
        ["commit", "/x", "vda", "--policy", "3"],
        ["commit", "/x", "vda", "--policy", '{"kind": 4}'],
        ["--daemon=/x", "chain", "web1"],
    ):
        said = run(*words)
        assert said.status != 0
        assert not PYTHON.search(said.err), said.err
