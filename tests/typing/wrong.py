"""Calls that a strict type checker refuses, each for the reason that stands beside it.

An ignore that nothing needs any more is an error too, so each is shown to be refused.
"""

from __future__ import annotations

import qmpcommit as qc


async def answers_nothing(ready: qc.Ready) -> None:
    """No policy: it comes to nothing."""


async def needs_a_group(ready: qc.GroupReady) -> qc.Policy:
    """A policy that only a whole group can be asked."""
    return qc.Keep() if ready.members else qc.Abort()


async def wrong(vm: qc.Session, host: qc.Client, ledger: qc.FileLedger) -> None:
    """All of them."""
    await qc.commit("/qmp", "vda", polcy=qc.Pivot())  # type: ignore[call-arg]
    await qc.commit("/qmp", policy=qc.Pivot())  # type: ignore[call-arg]
    await qc.commit("/qmp", "vda", policy=qc.Pivot)  # type: ignore[arg-type]
    await vm.commit("vda", policy=answers_nothing)  # type: ignore[arg-type]
    await vm.commit("vda", policy=needs_a_group)  # type: ignore[arg-type]
    await vm.commit("vda", policy=qc.Pivot(), bandwidth=1.5)  # type: ignore[arg-type]
    await vm.commit("vda", policy=qc.Pivot(), stale="burn")  # type: ignore[arg-type]
    await vm.commit("vda", policy=qc.Pivot(), only_if=1)  # type: ignore[arg-type]
    await vm.plan("vda", on_pivot=None)  # type: ignore[call-arg]
    qc.Hold(otherwise=qc.Hold())  # type: ignore[arg-type]
    qc.Check("./verify", timeout="60")  # type: ignore[arg-type]
    qc.Session.connect("/qmp", patience="long")  # type: ignore[arg-type]
    await vm.commit_group(["vda"], policy=qc.Keep(), shalow=True)  # type: ignore[call-arg]
    await vm.commit_group({7: qc.Keep()})  # type: ignore[dict-item]
    qc.GroupCommit([(vm,)])  # type: ignore[list-item]
    await vm.cycle("vda", keep_if=worth, gest="reset")  # type: ignore[call-overload]
    await vm.cycle("vda", keep_if=worth, freeze="hard")  # type: ignore[call-overload]
    vm.cycles("vda", every=60)  # type: ignore[call-overload]
    await vm.discard("vda", guest="kill")  # type: ignore[call-overload]
    vm.snapshot(["vda"], freeze="both")  # type: ignore[arg-type]
    outcome = await qc.resume(ledger, [vm])
    outcome.action  # type: ignore[union-attr]  # noqa: B018
    await host.vm("web1").commit("vda", ledger=ledger)  # type: ignore[call-arg]
    await host.commit_group([("web1", "vda", 7)])  # type: ignore[list-item]
    await qc.open_window(vm, "vda", name=7)  # type: ignore[arg-type]
    opened: str = await vm  # type: ignore[assignment]
    pivoted: bool = qc.VMGone("").pivoted  # type: ignore[assignment]
    print(opened, pivoted)


async def worth(ready: qc.Ready) -> bool:
    """Whether changes are kept."""
    return bool(ready.disk)
