"""In which states of a VM and of its migration its disks are its own."""

from __future__ import annotations

from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.migration import check_owner, look_at_owner, objection
from qmpcommit.errors import CommandRefused, VMStateError

RUNS = ("running", "paused", "io-error", "shutdown", "prelaunch")
OVER = ("", "none", "cancelled", "failed", "completed")
UNDER_WAY = (
    "setup", "wait-unplug", "active", "device", "pre-switchover", "postcopy-device",
    "postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover",
    "colo", "cancelling", "failing", "what a later QEMU calls it",
)  # fmt: skip


@pytest.mark.parametrize("migration", [*OVER, *UNDER_WAY])
@pytest.mark.parametrize("status", ["inmigrate", "postmigrate", "finish-migrate", *RUNS])
def test_only_a_vm_that_does_not_migrate_owns_its_disks(status: str, migration: str) -> None:
    another_hosts = status not in RUNS or migration in UNDER_WAY
    reset = (status, migration) == ("prelaunch", "completed")  # after it had migrated away
    if not another_hosts and not reset:
        check_owner("web1", status, migration)
        return
    with pytest.raises(VMStateError, match=r"migrat.*Nothing was sent") as error:
        check_owner("web1", status, migration)
    facts = error.value.vm, error.value.status, error.value.migration
    assert facts == ("web1", status, migration or "none")


class Answers(qc.Session):
    """Answers the two queries, or refuses them."""

    status: Any = None
    migration: Any = None

    async def execute(self, command: str, *more: Any, **options: Any) -> Any:
        answer = self.status if command == "query-status" else self.migration
        if isinstance(answer, str):
            raise CommandRefused(answer, command=command, desc=answer, error_class=answer)
        return answer


async def test_what_can_be_asked_tells(caplog: pytest.LogCaptureFixture) -> None:
    vm = Answers("/nowhere", name="web1")
    vm.status = vm.migration = "CommandNotFound"
    assert await look_at_owner(vm) is None, "a storage daemon"
    vm.status = {"status": "running"}
    assert await look_at_owner(vm) == "running", "a QEMU without migration"
    vm.migration = {}
    assert await look_at_owner(vm) == "running"
    assert await objection(vm) == ""
    vm.status = {"status": "prelaunch"}
    vm.migration = {"status": "completed", "total-time": 0}
    assert await look_at_owner(vm) == "prelaunch", "savevm"
    vm.migration = {"status": "completed"}
    assert await look_at_owner(vm) == "prelaunch", "it came from another host"
    vm.migration = {"status": "completed", "total-time": 13}
    with pytest.raises(VMStateError):
        await look_at_owner(vm)
    vm.migration = {"status": "active"}
    with pytest.raises(VMStateError):
        await look_at_owner(vm)
    assert "migrated" in await objection(vm)
    vm.migration = "GenericError"
    with pytest.raises(CommandRefused):
        await look_at_owner(vm)
    vm.migration = []
    with pytest.raises(qc.ProtocolViolation):
        await look_at_owner(vm)
