"""What the daemon counts and times, for Prometheus."""

from __future__ import annotations

import platform
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

import qmpcommit

_QUICK = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
_HTTP = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0)
_LONG = (0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200, 36000)


class Metrics:
    """All metrics of one daemon, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        made: Any = {"registry": self.registry, "namespace": "qmpcommit"}
        self.commits = Counter(
            "commits", "Commits that ended, by how and by policy", ("outcome", "policy"), **made
        )
        self.failures = Counter("failures", "Commits that failed, by error", ("error",), **made)
        self.phase_seconds = Histogram(
            "phase_seconds", "Seconds from start to READY, and from READY to the end",
            ("phase",), buckets=_LONG, **made,
        )  # fmt: skip
        self.reaction = Histogram(
            "reaction_seconds", "From READY to the decision's command, its record durable",
            buckets=_QUICK, **made,
        )  # fmt: skip
        self.bytes = Counter("committed_bytes", "Bytes that commits have copied", **made)
        self.guest_paused = Histogram(
            "guest_paused_seconds", "For how long a guest was paused", buckets=_QUICK, **made
        )
        self.groups = Counter("groups", "Groups that ended, by how", ("outcome",), **made)
        self.groups_live = Gauge("groups_live", "Groups that have not ended", ("phase",), **made)
        self.held = Histogram(
            "group_held_seconds", "For how long a disk of a group was held", buckets=_QUICK, **made
        )
        self.quiesced = Histogram(
            "guest_quiesced_seconds", "For how long a guest stood still for a group's instant",
            buckets=_QUICK, **made,
        )  # fmt: skip
        self.jobs = Gauge("jobs", "Commits that have not ended, by phase", ("phase",), **made)
        self.flatten_steps = Counter(
            "flatten_steps", "Commits that a flatten rule asked for, by how they ended",
            ("rule", "result"), **made,
        )  # fmt: skip
        self.flatten_failing = Gauge(
            "flatten_failing_disks", "Disks whose last step failed, by rule", ("rule",), **made
        )
        self.cycle_rounds = Counter(
            "cycle_rounds", "Rounds of cycles, by how they ended", ("vm", "disk", "result"), **made
        )
        self.cycle_kept_age = Gauge(
            "cycle_kept_age_seconds", "Since a round last carried changes into the base",
            ("vm", "disk"), **made,
        )  # fmt: skip
        self.windows = Gauge(
            "windows", "Snapshot windows that are not closed, by state", ("state",), **made
        )
        self.window_age = Gauge(
            "window_age_seconds", "Since when a disk is in a window", ("vm", "disk"), **made
        )
        self.window_size = Gauge(
            "window_overlay_bytes", "What the overlay of a window takes", ("vm", "disk"), **made
        )
        self.orphans = Gauge("orphan_jobs", "Jobs of ours that nobody owns", ("vm",), **made)
        self.vms = Gauge("vms", "VMs, by the state of their connection", ("state",), **made)
        self.reconnects = Counter("reconnects", "Connections that were lost", **made)
        self.journal_seconds = Histogram(
            "journal_write_seconds", "From a record's hand-over until it is durable",
            buckets=_QUICK, **made,
        )  # fmt: skip
        self.journal_units = Counter("journal_records", "Records written", **made)
        self.journal_full = Gauge("journal_full", "Whether the journal finds no room", **made)
        self.loop_lag = Gauge("event_loop_lag_seconds", "How late a timer of the loop was", **made)
        self.loop_lags = Histogram(
            "event_loop_lags_seconds", "How late timers of the loop were", buckets=_QUICK, **made
        )
        self.vm_up = Gauge("vm_up", "Whether a VM's monitor is connected", ("vm",), **made)
        self.ready_age = Gauge(
            "oldest_ready_job_seconds", "Since when the first of a VM's READY jobs is so", ("vm",),
            **made,
        )  # fmt: skip
        self.open_age = Gauge(
            "oldest_open_window_seconds", "Since when the first of a VM's windows is open", ("vm",),
            **made,
        )  # fmt: skip
        self.journal_bytes = Gauge("journal_bytes", "What the journal takes on its disk", **made)
        build = Gauge("build_info", "What runs: 1, and its versions", ("version", "python"), **made)
        build.labels(qmpcommit.__version__, platform.python_version()).set(1)
        ProcessCollector(registry=self.registry)
        self.request_seconds = Histogram(
            "http_request_seconds", "From a request's header to the end of its answer", ("method",),
            buckets=_HTTP, **made,
        )  # fmt: skip
        self.requests = Counter(
            "http_requests", "Requests, by method and status", ("method", "status"), **made
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
