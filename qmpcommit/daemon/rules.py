"""Flatten rules: chains that pass a limit are brought down by promises, one after the other.

A rule looks at its disks again and again. For one that has passed a limit it promises the commit
of the lowest overlay into the bottom layer, as a client would, and looks again when that has
ended. Nothing of a rule is in the journal but these promises, which are known by their jobs' ids:
after a restart they go on like all others, and the rule sees to the rest.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from fnmatch import fnmatchcase
from typing import Any

from qmpcommit.block.chain import Disk, read_disks
from qmpcommit.commit.claim import owner_in
from qmpcommit.cycles.flatten import Step
from qmpcommit.daemon.engine import Engine
from qmpcommit.daemon.journal import event
from qmpcommit.daemon.promise import Promise
from qmpcommit.daemon.registry import VM
from qmpcommit.daemon.steps import (
    STEP_PREFIX,
    commits_of,
    hands_off,
    is_for,
    overlay_size,
    passed,
    pause,
    request_of,
    step_of,
)
from qmpcommit.daemon.undertaking import Story
from qmpcommit.errors import QmpCommitError
from qmpcommit.log import Log
from qmpcommit.tasks import stop
from qmpcommit.wire.rules import Flatten, RuleDisk, RuleView

LOOKS = 8
"""VMs that one rule looks at at once."""


class Seen:
    """One disk as a rule saw it last."""

    def __init__(self, vm: str, disk: str) -> None:
        self.vm, self.disk = vm, disk
        self.layers = 0
        self.overlay_size = 0
        self.state = "within"
        self.why = ""
        self.commit: str | None = None
        self.failures = 0
        self.not_before = 0.0
        self.under_way = False

    def view(self) -> RuleDisk:
        """As the API shows it."""
        return RuleDisk.model_validate(
            {
                "vm": self.vm,
                "disk": self.disk,
                "layers": self.layers,
                "overlay_size": self.overlay_size,
                "state": self.state,
                "why": self.why,
                "commit": self.commit,
                "failures": self.failures,
                "not_before": self.not_before or None,
            }
        )


class Standing:
    """One rule, and what came of it."""

    def __init__(self, number: int, rule: Flatten) -> None:
        self.number, self.rule = number, rule
        self.last_look: float | None = None
        self.next_look: float | None = None
        self.disks: dict[tuple[str, str], Seen] = {}
        self.away: dict[str, str] = {}
        self.watching: asyncio.Task[None] | None = None

    def view(self) -> RuleView:
        """As the API shows it."""
        failing = sum(seen.failures > 0 for seen in self.disks.values())
        promised = sum(seen.state == "promised" for seen in self.disks.values())
        result = None
        if self.last_look is not None:
            result = f"{len(self.disks)} disks: {promised} being flattened, {failing} failing"
            if self.away:
                result += f"; {len(self.away)} VMs could not be asked"
        return RuleView(
            number=self.number,
            rule=self.rule,
            last_look=self.last_look,
            last_result=result,
            next_look=self.next_look,
            disks=[seen.view() for _, seen in sorted(self.disks.items())],
            away=self.away,
        )


class Rules(Story):
    """All rules of the configuration; what they promise the engine takes up."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.standing = [Standing(n, rule) for n, rule in enumerate(engine.config.flatten)]
        self._tasks: set[asyncio.Task[None]] = set()
        self._at_work: set[str] = set()
        self._log = Log()

    # -- the story --------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look."""
        for promise in list(self._engine.live.values()):
            if promise.job_id.startswith(STEP_PREFIX):
                self._go(self._take_up(promise), f"step {promise.id}")
        for standing in self.standing:
            self._begin(standing)

    def exchange(self) -> None:
        """Look by the rules that there are now; those that were there before know what they saw."""
        left = list(self.standing)
        self.standing = []
        for number, rule in enumerate(self._engine.config.flatten):
            standing = next((each for each in left if each.rule == rule), None)
            if standing is None:
                standing = Standing(number, rule)
                self._begin(standing)
            else:
                left.remove(standing)
                standing.number = number
            self.standing.append(standing)
        for gone in left:
            if gone.watching is not None:
                gone.watching.cancel()  # what it has promised goes on
        self._engine.metrics.flatten_failing.clear()

    def _begin(self, standing: Standing) -> None:
        standing.watching = self._go(self._watch(standing), f"flatten rule {standing.number}")

    async def stop(self) -> None:
        """Look no more; what was promised is the engine's."""
        for task in list(self._tasks):
            await stop(task)

    def gauge(self) -> None:
        """Bring the gauges up to date."""
        for standing in self.standing:
            failing = sum(seen.failures > 0 for seen in standing.disks.values())
            self._engine.metrics.flatten_failing.labels(str(standing.number)).set(failing)

    def _go(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- looking ----------------------------------------------------------------------------------

    async def _watch(self, standing: Standing) -> None:
        every = standing.rule.every
        while True:
            await self._look(standing)
            standing.last_look = time.time()
            standing.next_look = standing.last_look + every
            await asyncio.sleep(every)

    async def _look(self, standing: Standing) -> None:
        known = self._engine.registry.vms
        gate = asyncio.Semaphore(LOOKS)

        async def one(vm: VM) -> None:
            async with gate:
                await self._look_at(standing, vm)

        mine = [vm for vm in known.values() if fnmatchcase(vm.name, standing.rule.vm)]
        names = {vm.name for vm in mine}
        standing.disks = {key: seen for key, seen in standing.disks.items() if key[0] in names}
        standing.away = {name: why for name, why in standing.away.items() if name in names}
        await asyncio.gather(*(one(vm) for vm in mine))

    async def _look_at(self, standing: Standing, vm: VM) -> None:
        try:
            await self._look_closely(standing, vm)
        except Exception as error:  # a bug of ours must not end the rule
            self._log.warning("bug", vm=vm.name, rule=standing.number, error=repr(error))

    async def _look_closely(self, standing: Standing, vm: VM) -> None:
        if vm.name in self._at_work:
            return
        try:
            async with self._engine.registry.use(vm) as session:
                graph = await session.graph()
                disks = read_disks(graph)
        except QmpCommitError as error:
            standing.away[vm.name] = str(error)
            return
        standing.away.pop(vm.name, None)
        mine = [disk for disk in disks if disk.chain and is_for(standing.rule, disk)]
        names = {disk.name for disk in mine}
        for key in [k for k in standing.disks if k[0] == vm.name and k[1] not in names]:
            del standing.disks[key]
        for disk in mine:
            held = commits_of(self._engine.live.values(), vm.name, disk, disks)
            objection = hands_off(disk, held, owner_in(graph, disk), cycles=self._cycles_of(vm))
            step = self._judge(standing, vm.name, disk, objection)
            if step is not None:
                self._at_work.add(vm.name)
                seen = standing.disks[vm.name, disk.name]
                self._go(self._step(standing, seen, disk, step), f"flatten {vm.name}")
                break

    def _cycles_of(self, vm: VM) -> list[str]:
        """What cycles call disks of this VM, by whichever name they know it."""
        places = [place for cycle in self._engine.config.cycle for place in cycle.disks]
        known = self._engine.registry.vms
        same = [name for name, other in known.items() if other.last_identity == vm.identity != ""]
        return [disk for name, disk in places if name in {vm.name, *same}]

    def _judge(self, standing: Standing, vm: str, disk: Disk, objection: str) -> Step | None:
        """What is to be done with this disk now; None for nothing."""
        seen = standing.disks.setdefault((vm, disk.name), Seen(vm, disk.name))
        seen.layers, seen.overlay_size = len(disk.chain), overlay_size(disk)
        why = passed(standing.rule, disk)
        step = step_of(standing.rule, disk)
        if step is None:
            seen.under_way = False
        if not why and not seen.under_way:
            seen.state, seen.why, seen.failures = "within", "", 0
            return None
        if step is None:
            seen.state, seen.why = "within", f"{why}, but it has no more layers than are kept"
            return None
        if objection or vm in self._at_work:
            seen.state, seen.why = "left-alone", objection or "another disk of the VM comes first"
            return None
        if time.time() < seen.not_before:
            seen.state = "backing-off"
            return None
        seen.why = why or "it is being brought down"
        return step

    # -- one step ---------------------------------------------------------------------------------

    async def _step(self, standing: Standing, seen: Seen, disk: Disk, step: Step) -> None:
        """Promise one commit, and see its end."""
        try:
            request = request_of(standing.rule, disk, step)
            promise, _ = await self._engine.take(seen.vm, request, None, "")
            seen.state, seen.commit, seen.under_way = "promised", promise.id, True
            self._tell(standing, seen)
            promise.log.info("flatten_step", rule=standing.number, why=seen.why)
            await promise.over.wait()
            if promise.state == "done":
                seen.state, seen.failures, seen.not_before = "done", 0, 0.0
                self._engine.metrics.flatten_steps.labels(str(standing.number), "done").inc()
                self._tell(standing, seen)
            else:
                said = (promise.error or {}).get("message") or f"its commit was {promise.state}"
                self._failed(standing, seen, str(said), promise.state)
        except QmpCommitError as error:
            self._failed(standing, seen, str(error), "refused")
        except Exception as error:  # a bug of ours must not be tried again and again
            self._failed(standing, seen, f"internal error: {error!r}", "refused")
        finally:
            self._at_work.discard(seen.vm)
        self._look_on(seen.vm)

    async def _take_up(self, promise: Promise) -> None:
        """A step that a former daemon had promised: its disk is brought down further."""
        self._at_work.add(promise.vm)
        try:
            await promise.over.wait()
        finally:
            self._at_work.discard(promise.vm)
        if promise.state == "done":
            for standing in self.standing:
                if fnmatchcase(promise.vm, standing.rule.vm):
                    key = (promise.vm, promise.disk)
                    standing.disks.setdefault(key, Seen(*key)).under_way = True
        self._look_on(promise.vm)

    def _look_on(self, name: str) -> None:
        """A step has ended: this VM is looked at now, and not when it is its turn again."""
        vm = self._engine.registry.vms.get(name)
        for standing in self.standing:
            if vm is not None and fnmatchcase(name, standing.rule.vm):
                self._go(self._look_at(standing, vm), f"look at {name}")

    def _failed(self, standing: Standing, seen: Seen, why: str, result: str) -> None:
        seen.failures += 1
        wait = pause(standing.rule, seen.failures)
        seen.state, seen.why, seen.not_before = "backing-off", why, time.time() + wait
        self._engine.metrics.flatten_steps.labels(str(standing.number), result).inc()
        self._log.warning(
            "flatten_failed", vm=seen.vm, disk=seen.disk, rule=standing.number, why=why,
            failures=seen.failures, again_in=wait,
        )  # fmt: skip
        self._tell(standing, seen)

    def _tell(self, standing: Standing, seen: Seen) -> None:
        data = {"rule": standing.number, **seen.view().model_dump(mode="json")}
        told = event("flatten", seen.vm, seen.commit, json.dumps(data))
        self._engine.journal.write_soon(events=[told])
