"""Fuzzes what reads foreign data: ``python -m tests.fuzz SECONDS [TARGET]``, with atheris.

Each target runs so many seconds, or the one that is named. What it has found to be of interest
stays in ``.fuzz``, and the next run goes on from there; so does the input of a failure.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(".fuzz")
BEGAN = re.compile(r"INITED cov: (\d+)")
ENDED = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+)")


def fuzz(target: str, seconds: int) -> bool:
    """Whether a target has held; says how often it ran, and how many branches were reached."""
    corpus, log = FOLDER / target, FOLDER / f"{target}.log"
    corpus.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.atheris_targets", target, str(corpus),
               f"-max_total_time={seconds}", f"-artifact_prefix={FOLDER}/{target}-"]  # fmt: skip
    with log.open("w") as file:
        status = subprocess.run(command, check=False, stdout=file, stderr=file).returncode
    said = log.read_text(errors="replace")
    began, ended = BEGAN.search(said), ENDED.search(said)
    if status or began is None or ended is None:
        print(f"{target}: FAILED; the input and the traceback are named in {log}", flush=True)
        return False
    runs, reached = ended.groups()
    print(f"{target}: {runs} executions, {began[1]} to {reached} branches, no failure", flush=True)
    return True


def main() -> None:
    """All targets, one after another, or one."""
    try:
        importlib.import_module("atheris")
    except ImportError as error:
        sys.exit(f"atheris can't be used here: {error}")
    from tests.fuzz.atheris_targets import TARGETS

    match sys.argv[1:]:
        case [seconds] if seconds.isdecimal():
            targets = list(TARGETS)
        case [seconds, target] if seconds.isdecimal() and target in TARGETS:
            targets = [target]
        case _:
            sys.exit(f"{__doc__}\nTargets: {', '.join(TARGETS)}")
    held = [fuzz(target, int(seconds)) for target in targets]
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
