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

LIBRARY_ALONE = {
    "cli/relay.py": 1,  # HTML, whose attributes look the same
    "commit/policy.py": 4,  # what is no policy, answers with none, or was not given
    "commit/request.py": 1,  # a policy of one's own, for the daemon
    "commit/ledger.py": 1,  # what a ledger holds
    "guest/quiesce.py": 2,  # a freeze without its agents; the command counts them itself
    "wire/window.py": 1,  # the same of the daemon's API
}
"""How many texts of a file with Python in them only a caller of the library can meet."""


def texts(file: Path) -> Iterator[str]:
    """The strings of a file that are no docstrings, comments or keys."""
    tree = ast.parse(file.read_text())
    bare = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


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
