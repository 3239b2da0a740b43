"""What is asked of a fresh overlay on its way through the daemon and its client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from qmpcommit.commit.policy import Recycle
from qmpcommit.cycles.book import recycle_of
from qmpcommit.daemon.cycle_round import Round
from qmpcommit.wire.cycle import Cycle
from qmpcommit.wire.window import VMWindowRequest, WindowRequest

OPTIONS = {"discard": "unmap", "file": {"aio": "native"}}
CYCLE: dict[str, Any] = {"vm": "a", "disk": "vda", "every": 5, "keep_if": ["true"], "guest": "stop"}


def test_a_window_of_one_vm_hands_it_on() -> None:
    asked = VMWindowRequest(disks=["vda"], overlay_options=OPTIONS, overlay_secret="s0").of("a")
    assert (asked.overlay_options, asked.overlay_secret) == (OPTIONS, "s0")


@pytest.mark.parametrize("wrong", [{"overlay_options": {"driver": "raw"}}, {"overlay_secret": ""}])
def test_what_can_not_be_asked_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="overlay_"):
        VMWindowRequest(disks=["vda"], **wrong)
    with pytest.raises(ValidationError, match="overlay_"):
        WindowRequest.model_validate({"members": [{"vm": "a", "disk": "vda"}], **wrong})
    with pytest.raises(ValidationError, match="overlay_"):
        Cycle.model_validate({**CYCLE, **wrong})


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_cycles_recycle_has_what_the_configuration_asks(encrypted: bool) -> None:
    """Also where a former version has noted whether it is encrypted."""
    request = Cycle.model_validate({**CYCLE, "overlay_options": OPTIONS, "overlay_secret": "s0"})
    part = {"overlay": "/f"} if encrypted else {"overlay": "/f", "encrypted": False}
    journal: Any = None
    row = {
        **dict.fromkeys(("created", "state", "expires", "ended", "outcome", "error")),
        "id": "1", "vm": "a", "created": 0.0, "state": "keeping",
        "request": request.model_dump_json(), "noted": json.dumps({"parts": [part]}),
    }  # fmt: skip
    (noted,) = Round.load(row, journal).parts
    assert recycle_of(noted) == Recycle("/f", OPTIONS, "s0" if encrypted else None)
