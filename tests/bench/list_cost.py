"""What a list of a thousand rows costs the daemon's loop: CPU of its thread, and its longest pause.

Run: ``python -m tests.bench.list_cost``, in two trees one after the other to compare them.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from qmpcommit.daemon.journal import Statement
from tests.daemon.daemons import Daemon
from tests.daemon.test_feed import serving

ROWS = 1000
INSERT = """
    INSERT INTO commits (id, vm, disk, job_id, state, created, request, phase, ended, noted)
    WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ?)
    SELECT printf('%032x', i), 'web' || (i % 9), 'vda', 'qmpcommit-' || i, 'done', 7.0 + i,
        '{"disk": "vda", "policy": {"kind": "pivot"}}', 'finished', 9.0 + i, '{}' FROM n
"""


async def pauses(longest: list[float]) -> None:
    """How late the loop is, at most."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        longest[0] = max(longest[0], time.perf_counter() - before - 0.001)


async def main() -> None:
    sys.setswitchinterval(0.0005)  # as the daemon has it
    with tempfile.TemporaryDirectory() as name:
        async with serving(Path(name)) as engine:
            await engine.journal.write(Statement(INSERT, (ROWS - 1,)))
            for path in (f"/v1/commits?limit={ROWS}", f"/v1/commits?limit={ROWS}&fields=id,state"):
                costs, late = [], []
                for _ in range(7):
                    longest = [0.0]
                    watching = asyncio.create_task(pauses(longest))
                    await asyncio.sleep(0.01)
                    before = time.thread_time()
                    answer = await Daemon(Path(name), "").get(path)
                    costs.append(time.thread_time() - before)
                    watching.cancel()
                    late.append(longest[0])
                    assert len(answer.json) == ROWS
                print(
                    f"{path}: {statistics.median(costs) * 1000:.1f} ms of the loop's CPU (all that"
                    f" it does meanwhile), {statistics.median(late) * 1000:.1f} ms late at most"
                )


if __name__ == "__main__":
    asyncio.run(main())
