"""Mutation testing of what decides: which changes to the code no unit test notices.

``python -m tests.mutation`` has mutmut change the state machine, the policies and the plan, one
small change at a time, and runs the unit tests on each (``[tool.mutmut]`` in pyproject.toml). A
change that no test notices is a *survivor*. ``tests/mutants.txt`` lists those that may survive,
each with its reason; any other fails the run. A change of the words of a message is counted, and
not listed: messages are written for people. ``--keep`` judges the last run's results again.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TREE = Path("mutants")
KNOWN = Path(__file__).with_name("mutants.txt")
NAME = re.compile(r"(?P<module>.+)\.x(?:ǁ\w+ǁ|_)(?P<function>\w+?)__mutmut_(?P<number>\d+)$")
AROUND = 30
"""How much of a changed line is shown on either side of the change."""


def results() -> dict[str, str]:
    """What became of each mutant, by its name."""
    command = [sys.executable, "-m", "mutmut", "results", "--all", "true"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pairs = (line.split(": ") for line in said.splitlines() if "__mutmut_" in line)
    return {name.strip(): status.strip() for name, status in pairs}


def functions(module: str) -> dict[str, list[str]]:
    """The lines of all functions of a mutated module, originals and mutants, by their names."""
    path = TREE.joinpath(*module.split(".")).with_suffix(".py")
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[node.name] = ast.unparse(node).replace(node.name, "_", 1).splitlines()
    return found


def change(before: list[str], after: list[str]) -> str:
    """What a mutation changed, on one line."""
    while before and after and before[0] == after[0]:
        before, after = before[1:], after[1:]
    while before and after and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    old, new = (" ".join(line.strip() for line in lines) for lines in (before, after))
    start = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
    end = next((i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b), 0)
    end = max(0, min(end, len(old) - start, len(new) - start) - AROUND)
    cut = max(0, start - AROUND)
    shown = [text[cut : len(text) - end].strip() or "(nothing)" for text in (old, new)]
    return " => ".join(shown)


def only_words(old: str, new: str) -> bool:
    """Whether only a text that is a sentence was changed: its case, or an XX at its ends."""
    if old.casefold() != new.replace("XX", "").casefold():
        return False
    texts = [
        [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
        for source in (old, new)
    ]
    changed = [str(was) for was, now in zip(*texts, strict=True) if was != now]
    return all(" " in text for text in changed)


def survivors(found: dict[str, str]) -> Iterator[str]:
    """The mutants that no test noticed, each as a line of ``mutants.txt`` without its reason.

    One whose change is of words alone is an empty line.
    """
    sources: dict[str, dict[str, list[str]]] = {}
    for name, status in found.items():
        match = NAME.match(name)
        if match is None or status not in ("survived", "no tests", "suspicious"):
            continue
        module = match["module"]
        source = sources.setdefault(module, functions(module))
        plain = name.removeprefix(f"{module}.")
        original = f"{plain.rpartition('__mutmut_')[0]}__mutmut_orig"
        old, new = source[original], source[plain]
        short = module.rpartition(".")[2]
        words = only_words("\n".join(old), "\n".join(new))
        yield "" if words else f"{short}.{match['function']}: {change(old, new)}"


def known() -> Counter[str]:
    """The survivors that are explained."""
    lines = KNOWN.read_text().splitlines()
    explained = [line for line in lines if line and not line.startswith("# ")]
    assert all("  # " in line for line in explained), "each line has a reason"
    return Counter(line.rpartition("  # ")[0] for line in explained)


def main(arguments: list[str]) -> int:
    """Run the mutants, and compare the survivors with those that are explained."""
    if "--keep" not in arguments:
        subprocess.run([sys.executable, "-m", "mutmut", "run", *arguments], check=True)
    found = results()
    alive = Counter(survivors(found))
    words = alive.pop("", 0)
    new, gone = alive - known(), known() - alive
    counts = Counter(found.values())
    print(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    print(f"survivors: {alive.total()}, and {words} changes of words alone")
    for line in sorted(gone.elements()):
        print(f"no longer a survivor, take it out of {KNOWN.name}: {line}")
    for line in sorted(new.elements()):
        print(f"NOT NOTICED BY ANY TEST: {line}")
    unknown = counts["not checked"] + counts["segfault"]
    if new or unknown:
        print(f"{new.total()} survivors without a reason, {unknown} mutants not run")
    return 1 if new or gone or unknown else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
