"""What a round finds before it does anything, and what its command answers."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from qmpcommit.block.chain import absolute, find_disk, read_disks
from qmpcommit.block.identity import all_told_where
from qmpcommit.commit.in_use import check_unchanged
from qmpcommit.commit.overlay.options import OverlayOptions
from qmpcommit.commit.overlay.place import check_place, new_overlay
from qmpcommit.commit.plan import Plan
from qmpcommit.cycles.book import part_of
from qmpcommit.cycles.discarding import discard_of
from qmpcommit.cycles.run import (
    check_followed,
    deserves,
    plan_round,
)
from qmpcommit.daemon.cycle_round import Round
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.steps import commits_of, hands_off
from qmpcommit.errors import ChainError, InvalidRequest, JobConflict
from qmpcommit.names import JOB_PREFIX
from qmpcommit.session import Session

CONNECTING = 10.0
"""Seconds that a VM gets to be connected before its round begins."""


@asynccontextmanager
async def sessions(
    engine: Engine, vms: Iterable[str], wait: float
) -> AsyncIterator[dict[str, Session]]:
    """A session of each of these VMs; raises what `Registry.use` raises."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(engine.registry.use(engine.vm(name), wait=wait))
            for name in vms
        }


async def ask_command(engine: Engine, found: Round) -> None:
    """Whether the changes deserve it; the answer is durable before anything follows of it."""
    await found.move("asking")
    async with sessions(engine, found.vms, CONNECTING) as held:
        plans = await _plans(engine, found, held)
    keep = await deserves(plans, found.request.keep_if, found.request.timeout)
    async with sessions(engine, found.vms, CONNECTING) as held:
        asked_of, plans = plans, await _plans(engine, found, held)  # it may have taken its time
        check_unchanged(asked_of, plans)
        parts = []
        request = found.request
        asks = OverlayOptions.of(request.overlay_options, request.overlay_secret)
        places = [(held[plan.vm], plan.disk) for plan in plans]
        asked = await check_followed(places, plans, asks)
        for (vm, disk), plan, own in zip(request.disks, plans, asked, strict=True):
            former = absolute(plan.top, held[vm].cwd)
            if request.overlay_dir is None:
                await asyncio.to_thread(check_place, vm, plan, former)
            overlay = new_overlay(request.overlay_dir or os.path.dirname(former), former)
            part = {**part_of(held[vm], disk, overlay, own), "job_id": plan.job_id}
            if not keep:
                await _check_base(engine, disk, plan)
                part |= await discard_of(held[vm], plan, delete=request.delete)
            parts.append(part)
    await found.move("keeping" if keep else "discarding", parts=parts)


async def _plans(engine: Engine, found: Round, held: Mapping[str, Session]) -> list[Plan]:
    """What there is to be carried or discarded; raises where a disk is in use otherwise."""
    plans: list[Plan] = []
    stem = f"{JOB_PREFIX}c{found.id[:8]}"
    for number, (vm, name) in enumerate(found.request.disks):
        session = held[vm]
        _, graph = await session.look()
        pid = session.peer_pid
        disks = await asyncio.to_thread(all_told_where, graph, pid, read_disks(graph))
        disk = find_disk(disks, name, vm=vm, cwd=session.cwd)
        where = {"vm": vm, "disk": name}
        if any((plan.vm, plan.disk.root) == (vm, disk.root) for plan in plans):
            raise InvalidRequest(
                f"{name} is a disk of {vm} that its cycle names before; name it once. Nothing was"
                " changed",
                **where,
            )
        plan = plan_round(vm, disk, f"{stem}-{number:04x}" if found.request.together else stem)
        objection = hands_off(disk, commits_of(engine.live.values(), vm, disk, disks))
        if objection:
            raise JobConflict(
                f"{disk} of {vm} is left alone: {objection}. Nothing was changed", **where
            )
        plans.append(plan)
    return plans


async def _check_base(engine: Engine, disk: str, plan: Plan) -> None:
    """Raise `ChainError` where the base is known to be whole under its overlay only."""
    rows = await engine.journal.read(
        "SELECT * FROM commits WHERE vm = ? AND plan IS NOT NULL AND ended IS NOT NULL"
        " ORDER BY ended DESC LIMIT 1000",
        plan.vm,
    )
    for row in rows:
        if json.loads(row["plan"])["base"]["filename"] not in (plan.base.filename, plan.base.shown):
            continue
        outcome = json.loads(row["outcome"]) if row["outcome"] else {}
        if outcome.get("action", "abort") != "abort":
            return
        raise ChainError(
            f"the overlay of {disk} of {plan.vm} can't be discarded: commit {row['id']}"
            f" did not come to its end, so {plan.base.filename} holds part of an overlay's data"
            " and is whole under it only. Commit the overlay (pivot, keep or recycle) first."
            " Nothing was changed",
            vm=plan.vm,
            disk=disk,
            commit=row["id"],
        )
