"""The library's one-liner: ``library.py QMP DISK``."""

import asyncio
import sys

import qmpcommit as qc

asyncio.run(qc.commit(sys.argv[1], sys.argv[2], policy=qc.Pivot()))
