"""``qmpcommit cycle`` and ``flatten`` on a real QEMU."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.cli.command import end, run, run_out_of_time, start
from tests.ground.images import MIB, assert_disk, make_chain
from tests.ground.machines import Machine, machine


async def test_it_keeps(folder: Path) -> None:
    chain = make_chain(folder)
    told = folder / "told"
    ask = f'echo "$QMPCOMMIT_DISK $QMPCOMMIT_BASE" > {told}'
    async with machine(folder, chain, running=True) as qemu:
        words = ("cycle", qemu.qmp, "vda", "--keep-if", ask, "--reset", "--delete")
        said = await run(*words, "--json")
        assert (said.status, said.json["result"]) == (0, "kept")
        await qemu.quit()
    assert str(chain.base) in told.read_text()
    assert not chain.top.exists()
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(Path(said.json["overlay"]), chain.pictures[-1])


async def detecting(qemu: Machine) -> list[str]:
    """Whether zeroes are detected, for each disk."""
    return [each["inserted"]["detect_zeroes"] for each in await qemu.execute("query-block")]


async def test_it_discards(folder: Path) -> None:
    chain = make_chain(folder)
    overlay = folder / "here" / "next.qcow2"
    overlay.parent.mkdir()
    async with machine(folder, chain, running=True) as qemu:
        words = ("cycle", qemu.qmp, "vda", "--keep-if", "exit 1", "--overlay", overlay.name)
        refused = await run(*words)
        assert refused.status == 2
        assert "--reset or --stop" in refused.err
        asked = ("--stop", "--overlay-options", '{"detect-zeroes": "on"}')
        said = await run(*words, *asked, cwd=overlay.parent)  # QEMU runs in another folder
        assert said.status == 3
        assert await detecting(qemu) == ["on"]
        assert str(overlay) in said.out
        await qemu.quit()
    assert_disk(overlay, chain.pictures[0])
    assert_disk(chain.top, chain.pictures[-1])


async def test_several_disks_of_several_vms_end_the_same_way(folder: Path) -> None:
    (folder / "one").mkdir()
    (folder / "two").mkdir()
    chains = [
        make_chain(folder / "one"),
        make_chain(folder / "one", names=("base2", "top2")),
        make_chain(folder / "two"),
    ]
    told = folder / "told"
    ask = f'echo "$QMPCOMMIT_DISK" > {told}; exit 1'
    async with (
        machine(folder / "one", *chains[:2], running=True) as one,
        machine(folder / "two", chains[2], running=True) as two,
    ):
        words = (f"{one.qmp}:vda", f"{one.qmp}:vdb", f"{two.qmp}:vda")
        said = await run("cycle", *words, "--keep-if", ask, "--reset", "--delete", "--json")
        assert (said.status, said.json["result"]) == (3, "discarded"), said
        assert told.read_text().split() == ["vda", "vdb", "vda"]
        discarded = [each["overlay"] for each in said.json["rounds"]]
        words = (one.qmp, "vda", "vdb")
        said = await run("cycle", *words, "--keep-if", "true", "--reset")
        assert said.status == 0
        assert [line.split(":")[0] for line in said.out.splitlines()] == ["kept", "kept"]
        mixed = await run("cycle", f"{one.qmp}:vda", "vdb", "--keep-if", "true")
        assert (mixed.status, "is no QMP:DISK" in mixed.err) == (2, True)
        assert (await run("cycle", one.qmp, "--keep-if", "true")).status == 2
        await one.quit()
        await two.quit()
    assert_disk(Path(discarded[2]), chains[2].pictures[0])
    for chain in chains:
        assert not chain.top.exists()
        assert_disk(chain.base, chain.pictures[0])


async def test_no_answer_is_a_failure(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        said = await run("cycle", qemu.qmp, "vda", "--keep-if", "no-such-program", "--json")
        error = said.json["error"]  # the shell has said so, too
        assert (said.status, error["type"]) == (1, "CommitFailed")
        assert "Nothing was changed" in error["message"]
        assert (await run("cycle", qemu.qmp, "vda")).status == 2
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_out_of_time_while_it_asks_nothing_is_changed(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        words = ("cycle", qemu.qmp, "vda", "--keep-if", "sleep 600", "--json", "--timeout")
        for seconds in (1, 4, 16):
            said = await run(*words, seconds)
            assert (said.status, said.error["type"]) == (1, "DeadlineExceeded")
            if "nothing was sent" not in said.error["message"]:  # else the machine is busy
                break
        assert "qmpcommit chain" in said.error["message"]
        await qemu.quit()
    assert sorted(folder.glob("*.qcow2")) == [chain.base, chain.top]


async def test_out_of_time_while_it_keeps_it_tells_what_the_base_holds(folder: Path) -> None:
    chain = make_chain(folder, bulk=33 * MIB)
    slow = "throttle-group,id=slow,x-bps-write=8388608"
    extra = ["-object", slow, "-device", "virtio-blk-pci,drive=top,id=vda"]
    for options in (
        f"driver=file,node-name=file,filename={chain.base}",
        "driver=throttle,node-name=held,throttle-group=slow,file=file",
        "driver=qcow2,node-name=base,file=held",
        f"driver=qcow2,node-name=top,file.driver=file,file.filename={chain.top},backing=base",
    ):
        extra += ["-blockdev", options]
    async with machine(folder, extra=extra) as qemu:
        said = await run_out_of_time("cycle", qemu.qmp, "vda", "--keep-if", "true")
        assert "so do not discard them" in said.error["message"]
        assert "vda: aborted" in said.error["message"]
        assert "valid only under" in said.error["message"]
        assert await qemu.execute("query-jobs") == []
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_out_of_time_or_interrupted_a_flatten_tells_how_far_it_was(folder: Path) -> None:
    chain = make_chain(folder, 3, bulk=33 * MIB)
    async with machine(folder, chain) as qemu:
        words = ("flatten", qemu.qmp, "vda", "--keep", "1", "--bandwidth", "1MiB")
        said = await run_out_of_time(*words)
        assert f"{len(said.error['outcomes'])} layers were merged" in said.error["message"]
        assert "vda: aborted" in said.error["message"]
        assert await qemu.execute("query-jobs") == []
        process = await start(*words, "--json")
        while not await qemu.execute("query-jobs"):
            assert process.returncode is None
        process.send_signal(signal.SIGINT)
        said = await end(process)
        assert (said.status, said.error["type"]) == (130, "Interrupted")
        assert "layers were merged" in said.error["message"]
        await qemu.quit()
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_flatten_says_what_is_stale_and_what_the_guest_writes_to(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with machine(folder, chain) as qemu:
        said = await run("flatten", qemu.qmp, "vda", "--keep", "2")
        middle = chain.files[1]
        assert said.out.startswith(f"1 layer merged: {chain.base} -> {chain.top}\n"), said
        assert f"never boot it again: {middle}.\n" in said.out
        assert "active image" not in said.out
        said = await run("flatten", qemu.qmp, "vda", "--keep", "1")
        assert f"  The disk's active image is {chain.base} now.\n" in said.out
        assert f"never boot it again: {chain.top}.\n" in said.out
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
