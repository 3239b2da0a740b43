"""Which daemon a client asks."""

from __future__ import annotations

import pytest

import qmpcommit as qc
from qmpcommit.client import DEFAULT_SOCKET


def test_the_environment_names_the_daemon_as_it_does_for_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QMPCOMMIT_DAEMON", "/run/mine.sock")
    assert str(qc.Client().wire.address) == "/run/mine.sock"
    assert str(qc.Client("/run/another.sock").wire.address) == "/run/another.sock"
    monkeypatch.delenv("QMPCOMMIT_DAEMON")
    assert str(qc.Client().wire.address) == DEFAULT_SOCKET
