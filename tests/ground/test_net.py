"""The net under all tests: whoever forgets something fails, and is told of what."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.ground import forgetful
from tests.ground.complaints import WATCHED, complaints

TOP = Path(__file__).parents[2]

TOLD = {
    "test_never_awaited": "was never awaited",
    "test_unclosed_socket": "unclosed <socket",
    "test_unclosed_socket_without_a_loop": "unclosed <socket",
    "test_unclosed_loop": "unclosed event loop",
    "test_unclosed_stream": "ResourceWarning",
    "test_unclosed_file": "unclosed file",
    "test_socket_left_open": "sockets left open",
    "test_task_left_behind": "tasks left behind",
    "test_task_destroyed_while_pending": "Task was destroyed but it is pending",
    "test_exception_never_retrieved": "Task exception was never retrieved",
    "test_exception_never_retrieved_in_a_cycle": "Future exception was never retrieved",
    "test_exception_never_retrieved_in_a_loop_of_its_own": "Future exception was never retrieved",
    "test_callback_that_raises": "Exception in callback",
    "test_thread_that_raises": "ZeroDivisionError",
    "test_raises_where_nobody_hears": "Exception ignored",
    "test_process_left_behind": "processes left behind",
}


@pytest.mark.timeout(300)
def test_what_is_forgotten_fails_its_test(folder: Path) -> None:
    report = folder / "report.xml"
    subprocess.run(
        [sys.executable, "-X", "dev", "-m", "pytest", "-q", "-p", "no:cacheprovider",
         f"--junitxml={report}", "tests/ground/forgetful.py"],
        cwd=TOP, capture_output=True, check=False, timeout=240,
    )  # fmt: skip
    told: dict[str, str] = {}
    for case in ET.parse(report).iter("testcase"):
        name = str(case.get("name"))
        told[name] = told.get(name, "") + "".join(each.text or "" for each in case)
    wanted = {name for name, _ in inspect.getmembers(forgetful, inspect.isfunction)}
    assert set(told) == wanted == {*TOLD, "test_forgets_nothing"}
    assert not told["test_forgets_nothing"]
    silent = {name: told[name] for name, what in TOLD.items() if what not in told[name]}
    assert not silent


FORGETS = {
    "import asyncio; asyncio.sleep(0)": "was never awaited",
    "import socket; socket.socket()": "unclosed <socket",
    "import socket; kept = socket.socket()": "unclosed <socket",
    "import asyncio\nasync def fails(): raise ValueError\n"
    "async def main():\n asyncio.create_task(fails()); await asyncio.sleep(0)\n"
    "asyncio.run(main())": "Task exception was never retrieved",
    "import asyncio\nasync def main(): asyncio.get_running_loop()."
    "create_future().set_exception(ValueError())\n"
    "asyncio.run(main())": "Future exception was never retrieved",
    "import asyncio\nloop = asyncio.new_event_loop()\ntask = loop.create_task("
    "asyncio.sleep(9))\nloop.call_soon(loop.stop)\nloop.run_forever()\nloop.close()\n"
    "del loop, task\nimport gc; gc.collect()": "Task was destroyed",
}


def test_what_a_process_of_ours_forgets_is_heard() -> None:
    for code, what in FORGETS.items():
        said = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **WATCHED},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert any(what in line for line in complaints(said.stderr)), (code, said.stderr)
    assert complaints("qmpcommit: all went well\nwarning: the disk is full\n") == []
