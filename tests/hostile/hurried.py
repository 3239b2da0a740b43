"""The daemon, in whose life seconds are short: QMPCOMMIT_HURRY is JSON, {"module.NAME": value}."""

from __future__ import annotations

import importlib
import json
import os

import qmpcommit.cli.main

for place, value in json.loads(os.environ["QMPCOMMIT_HURRY"]).items():
    module, _, name = place.rpartition(".")
    found = importlib.import_module(f"qmpcommit.daemon.{module}")
    assert hasattr(found, name), place
    setattr(found, name, value)

if __name__ == "__main__":
    qmpcommit.cli.main.main()
