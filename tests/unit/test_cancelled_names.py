"""No public coroutine is missing where they are cancelled at each of their steps."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.daemon import test_cancelled as client
from tests.ground.public import to_be_awaited
from tests.real import test_cancelled as real
from tests.unit import test_cancellation as unit

Story = Callable[..., Any]

SESSION: dict[str, Story] = {
    **{
        f"Session.{name}": call
        for name, call in unit.ASKING.items()
        if name not in ("recover_several", "resolve_pending")
    },
    "Session.__aenter__": unit._open,
    "Session.__aexit__": unit._open,
    "Session.adopt": unit.test_adopt,
    "Session.close": unit._connect,
    "Session.commit": unit._commit,
    "Session.commit_group": unit._group_of_a_session,
    "Session.cycle": real._cycle,
    "Session.cycles": real._discarding_cycles,
    "Session.discard": real._discard,
    "Session.features": unit._opened,
    "Session.flatten": real._flatten,
    "Session.launch": unit._in_steps,
    "Session.open": unit._opened,
    "Session.overlay": real._overlay,
    "Session.pause_job": unit._steered,
    "Session.query_block": real._paused,
    "Session.query_status": real._paused,
    "Session.release": unit._released,
    "Session.restore": unit._lost,
    "Session.resume": unit._resumed,
    "Session.resume_job": unit._steered,
    "Session.set_bandwidth": unit._steered,
    "Session.snapshot": real._window,
    "Session.windows": real._window,
    "Session.open_window": real._recovered,
    "Session.close_window": real._recovered,
    "Session.recover_window": real._recovered,
}
JOBS: dict[str, Story] = {
    **{f"CommitJob.{name}": call for name, call in unit.IN_A_JOB.items()},
    "CommitJob.abandon": unit._given_up,
    "CommitJob.abort": unit._abort,
    "CommitJob.cancel": unit._given_up,
    "CommitJob.detach": unit._detached,
    "CommitJob.keep": unit._by_hand,
    "CommitJob.pivot": real._pivot,
    "CommitJob.progress": unit._progress,
    "CommitJob.recycle": real._recycle_by_hand,
    "CommitJob.seen": unit.test_adopt,
    "CommitJob.settled": unit._in_steps,
    "GroupCommit.abandon": unit._group_given_up,
    "GroupCommit.prepare": unit._group_in_steps,
    "GroupCommit.ready": unit._group_in_steps,
    "GroupCommit.run": unit._group_run,
    "GroupCommit.start": unit._group_in_steps,
    "GroupCommit.wait": unit._group_in_steps,
}
CALLS: dict[str, Story] = {
    "FileLedger.note": unit._noted,
    "FileLedger.noted": unit._noted,
    "Ledger.note": unit._noted,
    "commit": unit._one_call,
    "commit_group": real._group_of_two,
    "cycle": real._cycle_of_two,
    "discard": real._discard_of_two,
    "offline": unit.test_offline,
    "freeze": real._paused,
    "recover": unit.ASKING["recover_several"],
    "resume": unit._resumed_to_its_end,
    "resolve_pending": unit.ASKING["resolve_pending"],
    "snapshot": real._windows_of_two,
    "thaw": real._thawed,
}
CLIENT: dict[str, Story] = {
    "Client.__aenter__": client.reads,
    "Client.__aexit__": client.reads,
    "Client.add_vm": client.adds,
    "Client.ask": client.reads,
    "Client.close": client.opens,
    "Client.commit": client.reads,
    "Client.commit_group": client._group,
    "Client.commits": client.reads,
    "Client.cycles": client.reads,
    "Client.events": client.follows,
    "Client.group": client._group,
    "Client.groups": client.reads,
    "Client.open": client.opens,
    "Client.remove_vm": client.adds,
    "Client.rules": client.reads,
    "Client.losses": client.reads,
    "Client.snapshot": client.opens_a_window_of_two,
    "Client.vms": client.reads,
    "RemoteVM.adopt": client.adopts,
    "RemoteVM.commit": client._begun,
    "RemoteVM.cycle": client.runs_a_round,
    "RemoteVM.disk": client.reads_a_vm,
    "RemoteVM.disks": client.reads_a_vm,
    "RemoteVM.info": client.reads_a_vm,
    "RemoteVM.job": client.reads_a_vm,
    "RemoteVM.jobs": client.reads_a_vm,
    "RemoteVM.plan": client.reads_a_vm,
    "RemoteVM.overlay": client.lays_overlays,
    "RemoteVM.owners": client.reads_a_vm,
    "RemoteVM.pause_job": client.steers,
    "RemoteVM.resume_job": client.steers,
    "RemoteVM.set_bandwidth": client.steers,
    "RemoteVM.recycles": client.reads_a_vm,
    "RemoteVM.snapshot": client.opens_a_window,
    "RemoteJob.abort": client.aborts,
    "RemoteJob.cancel": client.aborts,
    "RemoteJob.decide": client.decides,
    "RemoteJob.detach": client.waits,
    "RemoteJob.keep": client.keeps,
    "RemoteJob.pivot": client.pivots,
    "RemoteJob.progress": client.waits,
    "RemoteJob.ready": client.waits,
    "RemoteJob.refresh": client.waits,
    "RemoteJob.wait": client.waits,
    "RemoteGroup.abort": client.ends_groups,
    "RemoteGroup.decide": client.ends_groups,
    "RemoteGroup.keep": client.keeps_a_group,
    "RemoteGroup.pivot": client.pivots_a_group,
    "RemoteGroup.refresh": client._group,
    "RemoteGroup.wait": client.keeps_a_group,
}
RUN: list[Story] = [
    *unit.ASKING.values(),
    *unit.IN_A_JOB.values(),
    *unit.WHOLE,
    *unit.LEAVING,
    *client.STORIES,
    *(story for _, story in real.STORIES),
]
CANCELLED: Mapping[str, Story] = {**SESSION, **JOBS, **CALLS, **CLIENT}
ENTERED = {
    "Session.__aenter__": "async with qc.Session.connect(",
    "Session.__aexit__": "async with qc.Session.connect(",
    "Client.__aenter__": "async with at.client(",
    "Client.__aexit__": "async with at.client(",
}


def test_every_public_coroutine_is_in_a_story() -> None:
    assert set(CANCELLED) == to_be_awaited()


@pytest.mark.parametrize("name", CANCELLED)
def test_the_story_is_about_it_and_is_run(name: str) -> None:
    story, (owner, _, called) = CANCELLED[name], name.rpartition(".")
    text = inspect.getsource(story)
    if name in ENTERED:
        assert ENTERED[name] in text
    else:
        assert re.search(rf"{'qc' if not owner else ''}\.{called}\(", text)
    parts = "\n".join(inspect.getsource(each) for each in RUN)
    beginning = story.__name__
    assert story in RUN or beginning.startswith("test_") or f"{beginning}(" in parts
