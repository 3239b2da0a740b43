"""Windows that are taken up by another process, from what was noted of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.claim import owners_of
from qmpcommit.window import claims as window_claims
from qmpcommit.window.claims import claim_again
from tests.cli.command import run as qmpcommit
from tests.ground.images import MIB, Write, assert_disk, create, make_chain, write
from tests.ground.machines import machine, storage_daemon
from tests.ground.sessions import runs


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


class Kept:
    """A ledger that remembers what was kept when the overlays were about to be laid."""

    def __init__(self) -> None:
        self.value: dict[str, Any] = {}

    async def note(self, step: str, state: object = None, **facts: Any) -> None:
        if step == "lay" and not self.value:
            told = {name: facts[name] for name in ("kind", "known_as", "over")}
            self.value = {**facts["value"], **told, "step": step}

    def moved(self, state: object) -> None:
        pass

    async def noted(self) -> dict[str, Any]:
        return self.value


@pytest.mark.parametrize("running", [False, True])
async def test_a_guest_that_was_paused_before_a_window_stays_so_when_it_is_taken_up(
    folder: Path, running: bool
) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain, running=True) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            if not running:
                await vm.execute("stop")
            kept = Kept()
            async with vm.snapshot(["vda"], freeze="pause", ledger=kept):
                pass
            if running:
                await vm.execute("stop")  # as whoever was killed has left it
            assert await qc.resume(kept, [vm]) == ()
            assert await runs(vm) is running
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_window_is_opened_and_closed_by_different_sessions(folder: Path) -> None:
    chains = make_chain(folder), make_chain(folder, names=("base2", "mid2", "low2", "top2"))
    notes = Notes()
    async with machine(folder, *chains) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            name = qc.new_window_name()
            opened = await vm.open_window(["vda", "vdb"], name=name, ledger=notes)
            assert opened.name == name
        assert notes.noted is not None
        async with qc.Session.connect(qemu.qmp) as vm:
            window = await vm.recover_window(notes.noted)
            assert window is not None
            assert dict(window) == dict(opened)
            outcomes = await vm.close_window(window, ledger=notes)
            assert [outcome.action for outcome in outcomes] == ["pivot", "pivot"]
            assert await vm.recover_window(notes.noted) is None
            assert await vm.close_window(notes.noted.disks.values()) == []
        assert notes.steps == ["create", "lay", "open", "close"]
        await qemu.quit()
    assert not list(folder.glob("*qmpcommit-window*"))
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_recovery_that_is_repeated_lets_all_disks_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = make_chain(folder, 2), make_chain(folder, 2, names=("base2", "top2"))
    notes = Notes()
    async with machine(folder, *chains) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            await vm.open_window(["vda", "vdb"], ledger=notes)
        assert notes.noted is not None
        async with qc.Session.connect(qemu.qmp) as vm:
            tried: list[str] = []

            async def once_lost(vm: qc.Session, each: Any) -> Any:
                tried.append(each.disk)
                if len(tried) == 2:
                    raise qc.MonitorLost("lost", vm=vm.name)
                return await claim_again(vm, each)

            monkeypatch.setattr(window_claims, "claim_again", once_lost)
            with pytest.raises(qc.MonitorLost):
                await vm.recover_window(notes.noted)
            window = await vm.recover_window(notes.noted)
            assert window is not None
            assert all(claim.held for claim in window.claims.values())
            await vm.close_window(window)
            assert await owners_of(vm) == []
        await qemu.quit()
    for chain in chains:
        assert_disk(chain.top, chain.pictures[-1])


@pytest.mark.parametrize("over", ["{0}/beside/..", "beside/.."], ids=["absolute", "relative"])
async def test_overlays_in_a_folder_that_is_named_by_another_are_found_again(
    over: str, folder: Path
) -> None:
    chain = make_chain(folder, 2)
    (folder / "beside").mkdir()
    notes = Notes()
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            async with vm.snapshot(["top"], overlay=over.format(folder)) as window:
                assert len((await vm.disk("export0")).chain) == 3
            assert [each.action for each in window.outcomes] == ["pivot"]
            await vm.open_window(["export0"], overlay=over.format(folder), ledger=notes)
        assert notes.noted is not None
        async with qc.Session.connect(qemu.qmp) as vm:
            taken = await vm.recover_window(notes.noted)
            assert taken is not None
            assert [each.action for each in await vm.close_window(taken)] == ["pivot"]
        await qemu.quit()
    assert not list(folder.glob("*qmpcommit-window*"))
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_name_that_is_none_is_refused(folder: Path) -> None:
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.InvalidRequest):
            await vm.open_window(["top"], name="../x")
        await qemu.quit()


async def test_chain_and_jobs_tell_of_windows_that_are_open(folder: Path) -> None:
    chains = make_chain(folder), make_chain(folder, names=("base2", "mid2", "low2", "top2"))
    async with machine(folder, *chains) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            await vm.open_window(["vdb"])
            (window,) = await vm.windows()
        for command in ("chain", "jobs"):
            said = await qmpcommit(command, qemu.qmp, "--json")
            (told,) = said.json["windows"]
            assert told["next"] == f"qmpcommit recover {qemu.qmp}"
            for name in ("disk", "overlay", "filename", "window"):
                assert told[name] == getattr(window, name)
            assert told["age"] >= 0
            assert told["size"] > 0
            assert said.json["window_remains"] == []
            assert f"vdb is in a window: its guest writes to {window.overlay}, open for" in said.err
            assert told["next"] in said.err
        assert (await qmpcommit("chain", qemu.qmp, "vda", "--json")).json["windows"] == []
        assert (await qmpcommit("window", "--close", qemu.qmp)).status == 0
        for command in ("chain", "jobs"):
            said = await qmpcommit(command, qemu.qmp, "--json")
            assert said.json["windows"] == []
            assert said.err == ""
        await qemu.quit()
    assert_disk(chains[1].top, chains[1].pictures[-1])


async def test_chain_and_jobs_tell_of_what_was_never_laid(folder: Path) -> None:
    chain = make_chain(folder)
    window = qc.new_window_name()
    name = f"top.qmpcommit-window-{window}.qcow2"
    create(folder / name, 64 * MIB)
    node = {"driver": "qcow2", "node-name": "qmpcommit-w00000000-0-top", "backing": None}
    async with storage_daemon(folder, chain) as qemu:
        async with qc.Session.connect(qemu.qmp) as vm:
            file = {"driver": "file", "filename": str(folder / name)}
            await vm.execute("blockdev-add", {**node, "file": file})
            marker = {"driver": "null-co", "node-name": "qmpcommit-w00000000-frozen"}
            await vm.execute("blockdev-add", marker)
        for command in ("chain", "jobs"):
            said = await qmpcommit(command, qemu.qmp, "--json")
            whats = {each["what"] for each in said.json["window_remains"]}
            assert whats == {node["node-name"], marker["node-name"]}
            assert said.err.count(f"'qmpcommit recover {qemu.qmp}'") == 2
            assert said.json.get("interrupted_recycles", []) == []
        said = await qmpcommit("window", "--close", qemu.qmp)
        assert said.status == 1
        assert "--agent SOCKET" in said.err
        async with qc.Session.connect(qemu.qmp) as vm:
            await vm.execute("blockdev-del", {"node-name": marker["node-name"]})
            assert not (folder / name).exists()
            create(folder / name, 64 * MIB)
            await vm.execute("blockdev-add", {**node, "file": file})
            frozen = qc.Frozen("top", str(chain.top), str(folder / name), str(node["node-name"]))
            noted = qc.NotedWindow(window, {"top": frozen})
            assert await vm.recover_window(noted) is None
        assert not (folder / name).exists()
        create(folder / name, 64 * MIB)
        said = await qmpcommit("window", "--close", qemu.qmp)
        assert f"cleared away what was left of a window: {folder / name}" in said.out
        assert not (folder / name).exists()
        said = await qmpcommit("window", "--close", qemu.qmp, "--json")
        assert (said.status, said.json["closed"], said.json["cleared"]) == (0, [], [])
        assert (await qmpcommit("chain", qemu.qmp)).err == ""
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_file_with_data_that_is_not_open_is_named_and_stays(folder: Path) -> None:
    chain = make_chain(folder)
    lost = folder / f"top.qmpcommit-window-{qc.new_window_name()}.qcow2"
    create(lost, None, backing=chain.top)
    empty = folder / f"top.qmpcommit-window-{qc.new_window_name()}.qcow2"
    create(empty, None, backing=chain.top)
    others = folder / f"other.qmpcommit-window-{qc.new_window_name()}.qcow2"
    create(others, None, backing=chain.top)
    write(lost, [Write(0, 512, 7)])
    async with storage_daemon(folder, chain) as qemu, qc.Session.connect(qemu.qmp) as vm:
        with pytest.raises(qc.WindowError, match="newest data") as failed:
            await vm.close_windows()
        assert failed.value.facts["remains"] == [str(lost)]
        await qemu.quit()
    assert lost.exists()
    assert others.exists()
    assert not empty.exists()
