"""A VM manager that embeds the library, as strict type checkers read it; it is never run.

Each door is used once, and what comes out is assigned to what it is said to be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack, assert_type

from pydantic import BaseModel
from qemu.qmp import QMPClient

import qmpcommit as qc

# -- policies: values, lists of them, callables --------------------------------------------------

END_OF_DAY = [qc.Keep(), qc.Pivot()]
POLICIES: Sequence[qc.PolicyValue] = END_OF_DAY

BY_DISK: Mapping[str, qc.AskedPolicy] = {
    "vda": qc.Pivot(),
    "vdb": {"kind": "keep"},
    "vdc": '{"kind": "abort"}',
    "vdd": qc.Check(["./verify"], timeout=30, passed=qc.Pivot(), failed=qc.Abort()),
}


async def by_size(ready: qc.Ready) -> qc.Policy:
    """A policy of one's own."""
    if ready.bytes_committed > 1 << 20:
        return qc.Recycle(f"{ready.top.filename}.next")
    return qc.Hold(timeout=60, otherwise=qc.Keep())


async def for_all(ready: qc.GroupReady) -> qc.PolicyValue:
    """A policy for a whole group."""
    await asyncio.sleep(0)
    return POLICIES[len(ready.members) % 2]


async def worth_it(ready: qc.Ready) -> bool:
    """Whether a round's changes are kept."""
    return ready.vm != "scratch"


def all_worth_it(ready: qc.GroupReady) -> bool:
    """The same of several disks."""
    return all(each.vm for each in ready.members)


# -- what a manager keeps -------------------------------------------------------------------------


class Saved(BaseModel):
    """A row of the manager's own database."""

    event: qc.Event
    any_of_them: qc.events.AnyEvent
    policy: qc.Policy
    outcome: qc.CommitOutcome | None = None


@dataclass
class Managed:
    """One VM."""

    name: str
    qmp: Path
    pid: int | None = None
    outcomes: list[qc.CommitOutcome] = field(default_factory=list[qc.CommitOutcome])


@dataclass
class Row:
    """A ledger that is a row of a database."""

    write: Callable[[Mapping[str, Any]], Awaitable[None]]
    value: dict[str, Any] = field(default_factory=dict[str, Any])

    async def note(self, step: str, state: Any = None, **facts: Any) -> None:
        """A step is about to be taken."""
        self.value = qc.add_note(self.value, step, state, **facts)
        await self.write(self.value)

    def moved(self, state: Any) -> None:
        """Another phase."""

    async def noted(self) -> dict[str, Any]:
        """All of it."""
        return self.value


# -- commits --------------------------------------------------------------------------------------


async def at_once(vm: Managed, **options: Unpack[qc.SessionOptions]) -> qc.CommitOutcome:
    """The one-liner, with options that are handed on."""
    outcome = await qc.commit(vm.qmp, "vda", **options)
    assert_type(outcome, qc.CommitOutcome)
    return outcome


async def followed(vm: Managed, policy: qc.AskedPolicy, ledger: Row) -> qc.CommitOutcome:
    """A commit whose way is shown, and whose end is kept."""
    async with qc.Session.connect(vm.qmp, name=vm.name) as session:
        assert_type(session, qc.Session)
        plan = await session.plan("vda", policy=policy, shallow=True)
        assert_type(plan, qc.Plan)
        job = await session.commit(
            "vda",
            policy=policy,
            base=-1,
            shallow=False,
            bandwidth="50MiB",
            delete=True,
            timeout=3600.0,
            only_if=["./worth-it"],
            override=["claim"],
            on_pivot=persisted,
            on_stall=stalled,
            converge=qc.Converge(deadline=60),
            ledger=ledger,
        )
        assert_type(job, qc.CommitJob)
        async for status in job.progress(every=1.0):
            assert_type(status.phase, qc.Phase)
            if status.phase == "ready":  # as before it was an enumeration
                print(status.current, status.total)
            if status.phase is qc.Phase.DECIDED:
                break
        async with asyncio.TaskGroup() as group:
            group.create_task(job.ready())
            waiting = group.create_task(job.wait())
        vm.outcomes.append(waiting.result())
        return await job.wait()


async def persisted(outcome: qc.CommitOutcome) -> None:
    """The VM's new disk path is written down."""
    assert outcome.active is not None
    print(outcome.active.filename, outcome.invalidated)


async def stalled(stall: qc.Stall) -> None:
    """The base is full."""
    print(stall)


async def shared(client: QMPClient, vm: Managed) -> None:
    """Over a client of the manager's own."""
    session = await qc.Session.over(client, name=vm.name, pid=vm.pid)
    assert_type(session, qc.Session)
    try:
        job = await session.commit("vda", policy=qc.Hold())
        await job.ready()
        async with asyncio.TaskGroup() as group:
            kept = group.create_task(job.keep())
            merging = group.create_task(session.flatten("vdb", keep=2))
        assert_type(merging.result(), list[qc.CommitOutcome])
        print(kept.done())
        adopted = await session.adopt("qmpcommit-1", policy=by_size, delete=True)
        await job.set_bandwidth(1 << 20)
        assert_type(adopted.job_id, str)
        with session.events("BLOCK_JOB_READY") as events:
            async for event in events:
                assert_type(event, qc.Event)
                print(event.name, event.timestamp, event.job_id)
                match event:
                    case qc.events.BlockJobReady(device=device, offset=offset):
                        print(device, offset)
                    case qc.events.ConnectionLost():
                        break
                    case _:
                        print(qc.events.parse_event(event.to_message()))
    finally:
        await session.close()


# -- several disks, several VMs -------------------------------------------------------------------


async def together(vms: Sequence[qc.Session], agents: Mapping[qc.Session, str]) -> None:
    """Groups, in each of their forms."""
    first, second = vms
    one = await first.commit_group(BY_DISK, freeze="pause")
    assert_type(one, qc.GroupOutcome)
    await first.commit_group(["vda", "vdb"], policy=for_all, hold_limit=1.0)
    both = await qc.commit_group(
        [(first, "vda"), (second, "vda")], policy=by_size, agents=agents, freeze="agent"
    )
    assert_type(both, qc.GroupOutcome)
    own = qc.GroupCommit(
        [(first, "vda", qc.Pivot()), qc.GroupMember(second, "vda", qc.Keep(), {"base": "/golden"})],
        on_decision=decided,
        timeout=60.0,
        override=("claim",),
    )
    await own.start()
    await own.ready()
    own.pivot()
    outcome = await own.wait()
    print([each.action for each in outcome.outcomes])


async def decided(jobs: Sequence[str]) -> None:
    """All disks are held."""
    print(jobs)


async def windows(vm: qc.Session, others: Sequence[qc.Session]) -> None:
    """Backup windows."""
    async with vm.snapshot(["vda"], freeze="pause", bandwidth="10MiB") as window:
        assert_type(window, qc.Window)
        print(window["vda"].filename, window.quiesced)
    async with qc.snapshot([(vm, "vda"), *((other, "vda") for other in others)]) as wide:
        print(wide[vm, "vda"].filename)
    opened = await vm.open_window(["vda"], name=qc.new_window_name(), freeze="pause")
    await vm.close_window(opened, bandwidth="10MiB")
    left = await vm.windows()
    assert_type(left, list[qc.OpenWindow])
    closed = await vm.close_windows()
    assert_type(closed, list[qc.CommitOutcome])


async def rounds(vm: qc.Session, ledger: qc.FileLedger) -> None:
    """Golden cycles."""
    options: qc.SessionCycleOptions = {"guest": "reset", "delete": True, "timeout": 60.0}
    one = await vm.cycle("vda", keep_if=worth_it, **options)
    assert_type(one, qc.Round)
    several = await vm.cycle(["vda", "vdb"], keep_if=all_worth_it, guest="stop", ledger=ledger)
    assert_type(several, tuple[qc.Round, ...])
    async for each in vm.cycle("vda", keep_if=["./worth-it"], every=3600.0, freeze="pause"):
        assert_type(each, qc.Round)
        break
    async for all_of_them in vm.cycles(["vda"], every=60, keep_if=worth_it, agents="/qga"):
        assert_type(all_of_them, tuple[qc.Round, ...])
        break
    gone = await vm.discard("vda", guest="reset")
    assert_type(gone, qc.Discarded)
    await qc.discard([(vm, "vda")], guest="stop", overlay="/overlays")
    merged = await vm.flatten("vda", keep=2)
    assert_type(merged, list[qc.CommitOutcome])
    async for outcome in vm.flatten("vda", keep=1, delete=True):
        assert_type(outcome, qc.CommitOutcome)


async def quiet(vm: qc.Session) -> float | None:
    """A guest that stands still."""
    async with qc.freeze(vm, "pause", limit=5) as held:
        assert_type(held, qc.Quiet)
    await qc.thaw(vm, "pause")
    return held.seconds


async def switched_off(image: Path) -> None:
    """With the VM off."""
    async with qc.offline(image) as session:
        assert_type(session, qc.Session)
        await (await session.commit("disk", policy=qc.Pivot())).wait()


# -- after a death --------------------------------------------------------------------------------


async def again(ledger: qc.FileLedger, vms: Sequence[qc.Session]) -> str:
    """Go on with whatever it was."""
    found = await qc.resume(ledger, vms, policy=for_all)
    match found:
        case qc.CommitOutcome() | qc.GroupOutcome():
            return str(found.action)
        case _:
            return f"{len(found)} of them"


async def put_right(vm: qc.Session) -> list[str]:
    """What any death has left."""
    recovered = await vm.recover(decide="keep")
    assert_type(recovered, qc.Recovered)
    return [each.what for each in recovered.findings]


# -- errors ---------------------------------------------------------------------------------------


async def careful(vm: Managed) -> str:
    """Every fact of an error has a type, and is there."""
    try:
        await at_once(vm, policy=END_OF_DAY[0], stale="rename", on_error="stop")
    except qc.PolicyRequired:
        return "say what to do in the second phase"
    except qc.DiskNotFound as error:
        return ", ".join(error.candidates)
    except qc.VMGone as error:
        assert_type(error.pivoted, bool | None)
        assert_type(error.base, str | None)
        return error.base or "" if error.pivoted else error.top or ""
    except qc.GroupSplit as error:
        return ", ".join([*error.pivoted, *error.not_pivoted, *error.unknown])
    except qc.CommandRefused as error:
        return f"{error.command}: {error.error_class}: {error.desc}"
    except qc.JobConflict as error:
        return f"{error.vm} {error.disk} {error.job_id} {error.owner or error.status}"
    except qc.OnlyIfFailed as error:
        return f"{error.command} {error.exit_status}"
    except (qc.MonitorLost, qc.DeadlineExceeded) as error:
        return f"{error.command} {error.outcome}"
    except qc.CommitFailed as error:
        return error.error or error.message
    except qc.QmpCommitError as error:
        return str(error.to_dict()["type"])
    return "done"


# -- through the daemon ---------------------------------------------------------------------------


async def promised(**options: Unpack[qc.RemoteOptions]) -> None:
    """What survives this process."""
    async with qc.Client("/run/qmpcommit/qmpcommitd.sock", timeout=5) as host:
        remote = host.vm("web1")
        job = await remote.commit("vda", idempotency_key="key", **options)
        assert_type(job, qc.RemoteJob)
        assert_type(await job.wait(), qc.CommitOutcome)
        group = await host.commit_group(
            [("web1", "vda"), (remote, "vdb", qc.Keep())], hold_limit=1.0, priority=3
        )
        assert_type(await group.wait(), qc.GroupOutcome)
        async with remote.snapshot(["vda"], lease=30) as window:
            assert_type(window, qc.Window)
        async with host.events(vm="web1") as events:
            async for event in events:
                assert_type(event, qc.DaemonEvent)
