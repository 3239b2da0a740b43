"""An embedder's program as strict type checkers read it; mypy reads it with all the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_pyright_accepts_the_embedders_program() -> None:
    """Where it is installed (the extra `types`); it is a large download for one test."""
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "-p", str(HERE), "--pythonpath", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
