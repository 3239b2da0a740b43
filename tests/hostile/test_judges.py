"""What the programs of others say of what we ship: `tests/run.sh --judges` fetches them."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from tests.daemon.daemons import daemon

ALERTS = Path(str(resources.files("qmpcommit.daemon"))) / "system" / "alerts.yml"


def judged(program: str, *words: str) -> None:
    """Fail with what it says where it finds fault; skip where it is not there."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run(
        [path, *words], capture_output=True, text=True, check=False, timeout=80,
        env={**os.environ, "REDOCLY_TELEMETRY": "off", "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_alert_rules() -> None:
    judged("promtool", "check", "rules", str(ALERTS))


async def test_redocly_finds_no_fault_with_the_document(folder: Path) -> None:
    document = folder / "openapi.json"
    async with daemon(folder) as d:
        document.write_bytes((await d.get("/openapi.json")).body)
    words = ("lint", "--extends", "recommended-strict", "--format", "stylish", str(document))
    await asyncio.to_thread(judged, "redocly", *words)
