"""What is logged, by whoever has structlog configured."""

from __future__ import annotations

import structlog
from structlog.testing import capture_logs

from qmpcommit.log import Log


def test_a_fact_counts_where_one_of_its_name_is_bound() -> None:
    structlog.configure()
    try:
        with capture_logs() as lines:
            Log(vm="a,b", job="j").warning("held", vm="b")
    finally:
        structlog.reset_defaults()
    assert lines == [{"event": "held", "log_level": "warning", "vm": "b", "job": "j"}]
