"""Windows that are taken up by another process, from what was noted of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import machine, storage_daemon


class Notes:
    """A ledger that remembers."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.noted: qc.NotedWindow | None = None

    async def note(self, step: str, **facts: Any) -> None:
        self.steps.append(step)
        if step == "create":
            json = facts["window"].model_dump(mode="json")
            self.noted = qc.NotedWindow.model_validate(json)


async def test_each_step_is_noted_before_it_is_taken(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain, running=True) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            notes = Notes()
            async with vm.snapshot(["vda"], freeze="pause", ledger=notes) as window:
                assert notes.noted is not None
                assert notes.noted.disks == dict(window)
            assert notes.steps == ["create", "freeze", "lay", "thaw", "open", "close"]
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_window_is_opened_and_closed_by_different_sessions(folder: Path) -> None:
    chains = make_chain(folder), make_chain(folder, names=("base2", "mid2", "low2", "top2"))
    notes = Notes()
    async with machine(folder, *chains) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            name = qc.new_window_name()
            opened = await qc.open_window(vm, ["vda", "vdb"], name=name, ledger=notes)
            assert opened.name == name
        assert notes.noted is not None
        async with qc.Session.connect(qemu.qmp) as vm:
            window = await qc.recover_window(vm, notes.noted)
            assert window is not None
            assert dict(window) == dict(opened)
            outcomes = await qc.close_window(vm, window, ledger=notes)
            assert [outcome.action for outcome in outcomes] == ["pivot", "pivot"]
            assert await qc.recover_window(vm, notes.noted) is None
            assert await qc.close_window(vm, notes.noted.disks.values()) == []
        assert notes.steps == ["create", "lay", "open", "close"]
        await qemu.quit()
    assert not list(folder.glob("*qmpcommit-window*"))
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_name_that_is_none_is_refused(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.InvalidRequest):
            await qc.open_window(vm, ["top"], name="../x")
        await qemu.quit()
