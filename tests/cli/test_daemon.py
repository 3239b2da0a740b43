"""``qmpcommit --daemon``: the same commands, options, answers and exit statuses as without."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from tests.cli.command import (
    end,
    on_a_terminal,
    qmpcommit,
    run,
    run_out_of_time,
    start,
    taken,
)
from tests.cli.test_commit import job_of
from tests.cli.test_help import imported
from tests.daemon.daemons import Daemon, host_of
from tests.ground.images import (
    MIB,
    Chain,
    Picture,
    Write,
    assert_disk,
    create,
    make_chain,
    read,
    write,
)
from tests.ground.machines import machine, storage_daemon
from tests.ground.small_disk import fill, needs_mounts, small_disk

BULK = 33 * MIB
SLOW = ("--bandwidth", "1MiB")  # with BULK, READY is half a minute away


def through(d: Daemon) -> str:
    """The option."""
    return f"--daemon={d.socket}"


# -- the same, directly and through the daemon -----------------------------------------------------

CASES: dict[str, list[str]] = {
    "pivot": ["top", "--pivot"],
    "keep": ["top", "--keep-overlay"],
    "abort": ["top", "--abort"],
    "a hold that runs out": ["top", "--hold", "0.1"],
    "a check that passes": ["top", "--check", "true"],
    "a check that fails": ["top", "--check", "exit 7"],
    "a policy as JSON": ["top", "--policy", '{"kind": "check", "command": ["true"]}'],
    "only if it is so": ["top", "--pivot", "--only-if", "true"],
    "only if it is not so": ["top", "--pivot", "--only-if", "false"],
    "by file name": ["TOP", "--pivot"],
    "deleted": ["top", "--pivot", "--delete"],
    "renamed": ["top", "--pivot", "--rename"],
    "persisted": ["top", "--pivot", "--delete", "--on-pivot", 'test -n "$QMPCOMMIT_ACTIVE"'],
    "not persisted": ["top", "--pivot", "--delete", "--on-pivot", "false"],
    "one phase": ["top", "--top", "1", "--shallow"],
    "no policy for layer 0": ["top", "--top", "0"],
    "into a layer": ["top", "--pivot", "--base", "1"],
    "shallow": ["top", "--keep-overlay", "--shallow"],
    "with bandwidth": ["top", "--pivot", "--bandwidth", "500MiB"],
    "converging": ["top", "--pivot", "--converge", "30"],
    "no such disk": ["vdz", "--pivot"],
    "no such layer": ["top", "--pivot", "--base", "nolayer"],
    "into itself": ["top", "--pivot", "--base", "0"],
    "no such check": ["top", "--pivot", "--override", "nosuchcheck"],
    "quiet": ["top", "--pivot", "--quiet"],
    "dry run": ["top", "--pivot", "--dry-run"],
    "dry run of one phase": ["top", "--top", "1", "--dry-run", "--on-error", "stop"],
    "dry run without policy": ["top", "--dry-run"],
    "no policy": ["top"],
    "two policies": ["top", "--pivot", "--keep-overlay"],
    "malformed policy": ["top", "--policy", "{"],
    "malformed size": ["top", "--pivot", "--bandwidth", "fast"],
    "malformed time": ["top", "--pivot", "--timeout", "soon"],
}


AS_TEXT = ("pivot", "abort", "not persisted", "quiet", "dry run", "no such disk", "two policies")


@pytest.mark.parametrize(
    ("case", "form"), [*((case, "json") for case in CASES), *((case, "text") for case in AS_TEXT)]
)
async def test_a_commit_is_as_without_a_daemon(case: str, form: str, folder: Path) -> None:
    ended: list[tuple[Any, ...]] = []
    for place in (folder / "a", folder / "b"):
        place.mkdir()
        chain = make_chain(place, 3)
        words = [str(chain.top) if word == "TOP" else word for word in CASES[case]]
        words += ["--json"] if form == "json" else []
        if place.name == "a":
            async with storage_daemon(place, chain) as qemu:
                said = await run("commit", qemu.qmp, *words)
                await qemu.quit()
        else:
            async with host_of(place, chain, "commands = true") as (d, qemu):
                said = await run(through(d), "commit", "web1", *words)
                assert await qemu.execute("query-jobs") == []
        answer: Any = _plain(said.json, place) if form == "json" else _text(said.out, place)
        if form == "json" and "error" in answer:
            answer["error"].pop("job_id", None)  # the daemon gives it before anything is asked
        ended.append((said.status, answer, _text(said.err, place), _shown(chain)))
    assert ended[0] == ended[1]


def _shown(chain: Chain) -> list[str]:
    """Which layers' pictures each file shows, and which files there are."""
    found = [path.name.partition(".stale-")[0] for path in chain.base.parent.glob("*.qcow2.*")]
    for path in chain.files:
        if path.exists():
            shown = read(path)
            same = [n for n, picture in enumerate(chain.pictures) if picture.data == shown]
            found.append(f"{path.name} shows {same}")
    return found


def _plain(value: Any, place: Path, name: str = "") -> Any:
    """Without what differs each time: times, ids, places and the VM's name."""
    if isinstance(value, dict):
        return {key: _plain(item, place, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, place) for item in value]
    if name in ("started", "ready", "decided", "ended"):
        return value is not None
    if isinstance(value, float) or name in ("remaining_first", "remaining_last", "free"):
        return "N"
    return _text(value, place) if isinstance(value, str) else value


def _text(text: str, place: Path) -> str:
    text = text.replace(f"{place}/qmp", "web1").replace(str(place), "PLACE")
    text = re.sub(r"qmpcommit-top-[0-9a-f]{8}", "JOB", text)
    text = text.replace("/bin/sh -c ", "")
    return re.sub(r"(?<![A-Za-z])\d[\d.:]*( (ms|s|min|h|B|[KMGT]iB)\b)?", "N", text)


async def test_the_chain_and_the_jobs_are_as_without_a_daemon(folder: Path) -> None:
    chain = make_chain(folder, 3)
    async with host_of(folder, chain) as (d, qemu):
        for words in (["chain"], ["chain", "--dot"], ["chain", "--json"], ["jobs", "--json"]):
            direct = await run(words[0], qemu.qmp2, *words[1:])
            remote = await run(through(d), words[0], "web1", *words[1:])
            assert (direct.status, direct.err) == (remote.status, remote.err) == (0, "")
            left = ', "left": []'  # which a daemon puts right by itself
            assert direct.out.replace(qemu.qmp2, "web1").replace(left, "") == remote.out
        async with qc.Session.connect(qemu.qmp2) as vm, vm.snapshot(["top"]):
            for command in ("chain", "jobs"):
                said = await run(through(d), command, "web1", "--json")
                (held,) = said.json["held"]
                assert (held["work"], held["pid"]) == ("a snapshot window", os.getpid())
                assert f"qmpcommit: {held['message']}" in said.err
        one = await run(through(d), "chain", "web1", str(chain.top), "--json")
        assert [disk["name"] for disk in one.json["disks"]] == ["top"]
        for words in (["chain", "web1", "vdz"], ["pivot", "web1", "nojob"]):
            assert (await run(through(d), *words)).status == 4
        theirs = {"job_id": "theirs", "device": "top", "auto_dismiss": False}
        await qemu.execute("block-commit", **theirs)
        await job_of(qemu, "ready")
        said = await run(through(d), "jobs", "web1")
        assert f"qmpcommit pivot|keep|abort {qemu.qmp} theirs" in said.out  # not the daemon's
        said = await run(through(d), "wait", "web1", "theirs")  # nobody has said how it ends
        assert (said.status, "wait web1 theirs --then pivot" in said.err) == (2, True)
        said = await run(through(d), "abort", "web1", "theirs", "--json")  # it becomes its own
        assert (said.status, said.json["action"]) == (0, "abort")
        assert await qemu.execute("query-jobs") == []
    assert_disk(chain.top, chain.pictures[-1])


# -- the second phase from elsewhere ---------------------------------------------------------------


@pytest.mark.parametrize("decision", ["pivot", "keep", "abort"])
async def test_a_commit_is_decided_from_elsewhere(decision: str, folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with host_of(folder, chain) as (d, qemu):
        holding = await start(through(d), "commit", "web1", "top", "--hold", *SLOW, "--json")
        commit, job = await _begun(d)
        early = await run(through(d), "pivot", "web1", job, "--json")
        assert (early.status, early.error["type"]) == (5, "NotReady")
        await qemu.execute("block-job-set-speed", device=job, speed=0)
        await d.until(commit, "ready")
        said = await run(through(d), "jobs", "web1")
        assert f"qmpcommit --daemon={d.socket} pivot|keep|abort web1 {job}" in said.out
        name = commit if decision == "keep" else job
        ended = await run(through(d), decision, "web1", name, "--json")
        assert (ended.status, ended.json["action"]) == (0, decision)
        held = await end(holding)
        assert (held.status, held.json) == (0, ended.json)
        again = await run(through(d), decision, "web1", job, "--json")
        assert (again.status, again.error["type"]) == (4, "JobNotFound")
        again = await run(through(d), decision, "web1", commit, "--json")
        assert (again.status, again.error["type"]) == (1, "JobConflict")
    if decision != "abort":
        assert_disk(chain.base, chain.pictures[-1])
    if decision != "pivot":
        assert_disk(chain.top, chain.pictures[-1])


async def test_a_commit_is_left_with_the_daemon_and_waited_for(folder: Path) -> None:
    chain = make_chain(folder)
    async with host_of(folder, chain) as (d, _):
        said = await run(through(d), "commit", "web1", "top", "--hold", "--detach", "--json")
        assert said.status == 0, said.err
        commit = said.json["id"]
        assert f"wait web1 {commit}" in said.json["next"]
        ready = await run(through(d), "wait", "web1", commit, "--until", "ready")
        assert (ready.status, "is READY, and stays so" in ready.out) == (0, True)
        wrong = await run(through(d), "wait", "web1", commit, "--then", "pivot", "--delete")
        assert (wrong.status, "done by it" in wrong.err) == (2, True)
        said = await run(through(d), "wait", "web1", commit, "--then", "pivot", "--json")
        assert (said.status, said.json["action"]) == (0, "pivot")
        again = await run(through(d), "wait", "web1", commit, "--json")
        assert again.json == said.json
    assert_disk(chain.base, chain.pictures[-1])


async def _begun(d: Daemon) -> tuple[str, str]:
    """The one commit of the daemon and its job, once it copies."""
    async with asyncio.timeout(30):
        while not (found := (await d.get("/v1/commits")).json):
            await asyncio.sleep(0.01)
    await d.until(found[0]["id"], "copying")
    return found[0]["id"], found[0]["job_id"]


# -- interrupted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_one_interrupt_has_the_daemon_abort_it(number: int, folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with host_of(folder, chain) as (d, qemu):
        process = await start(through(d), "commit", "web1", "top", "--pivot", *SLOW, "--json")
        _, job = await _begun(d)
        process.send_signal(number)
        said = await end(process)
        assert (said.status, said.error["type"]) == (130, "Interrupted")
        assert said.error["job_id"] == job
        assert said.error["outcome"]["action"] == "abort"
        assert await qemu.execute("query-jobs") == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_second_interrupt_leaves_it_with_the_daemon(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with host_of(folder, chain) as (d, qemu):
        process = await start(through(d), "commit", "web1", "top", "--pivot", *SLOW)
        commit, _ = await _begun(d)
        assert d.process is not None
        d.process.send_signal(signal.SIGSTOP)  # so that the first one can't be carried out
        process.send_signal(signal.SIGINT)
        await taken(process, signal.SIGINT)
        assert process.returncode is None
        process.send_signal(signal.SIGINT)
        said = await end(process)
        assert said.status == 130
        assert "perhaps" in said.err
        if not said.err.startswith("qmpcommit: interrupted before the daemon had promised it"):
            # A command that is slow has not heard the commit's id yet.
            assert said.err.startswith("qmpcommit: interrupted twice")
            assert f"'qmpcommit --daemon={d.socket} pivot|keep|abort web1 {commit}'" in said.err
        d.process.send_signal(signal.SIGCONT)
        with suppress(OSError):
            await d.post(f"/v1/commits/{commit}/decision", {"action": "abort"})
        assert (await d.end_of(commit))["outcome"]["action"] == "abort"
        assert await qemu.execute("query-jobs") == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_the_deadline_is_the_daemons_too(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with host_of(folder, chain, "[limits]\ncommits = 1\n") as (d, qemu):
        await run_out_of_time(through(d), "commit", "web1", "top", "--pivot", *SLOW)
        assert await qemu.execute("query-jobs") == []
        ended = (await d.get("/v1/commits")).json[0]
        assert ended["error"]["type"] == "DeadlineExceeded"
    assert_disk(chain.top, chain.pictures[-1])


async def test_a_deadline_in_the_queue(folder: Path) -> None:
    chain = make_chain(folder)
    other = folder / "other"
    other.mkdir()
    second = make_chain(other)
    config = f'[limits]\ncommits = 1\n[[vm]]\nname = "web2"\nqmp = "{other}/qmp"\n'
    async with storage_daemon(other, second), host_of(folder, chain, config) as (d, _):
        await d.connected("web2")
        first = await d.commit("web1", disk="top", policy={"kind": "hold"})
        said = await run_out_of_time(through(d), "commit", "web2", "top", "--pivot")
        assert "Nothing was sent" in said.error["message"]
        queued = (await d.get("/v1/commits?vm=web2")).json[0]
        assert (queued["state"], queued["error"]["type"]) == ("failed", "DeadlineExceeded")
        await d.post(f"/v1/commits/{first}/decision", {"action": "abort"})
        assert (await d.end_of(first))["outcome"]["action"] == "abort"
    assert_disk(chain.top, chain.pictures[-1])
    assert_disk(second.base, second.pictures[0])
    assert_disk(second.top, second.pictures[-1])


async def test_a_daemon_that_is_restarted_meanwhile(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with host_of(folder, chain) as (d, qemu):
        process = await start(through(d), "commit", "web1", "top", "--pivot", *SLOW, "--json")
        _, job = await _begun(d)
        await d.kill()
        await qemu.execute("block-job-set-speed", device=job, speed=0)
        await d.start()
        said = await end(process)
        assert (said.status, said.json["action"], said.json["job_id"]) == (0, "pivot", job)
    assert_disk(chain.base, chain.pictures[-1])


async def test_the_bar_on_a_terminal(folder: Path) -> None:
    chain = make_chain(folder, bulk=BULK)
    async with host_of(folder, chain) as (d, _):
        words = ("commit", "web1", "top", "--hold", "3", "--bandwidth", "16MiB")
        said = await on_a_terminal(through(d), *words, columns=200)
        assert said.status == 3
        assert "kept" in said.out
        assert " of 3" in said.out  # MiB
        assert "READY (qmpcommit --daemon=" in said.out
    assert_disk(chain.base, chain.pictures[-1])
    assert_disk(chain.top, chain.pictures[-1])


@needs_mounts
async def test_a_full_base_is_told_of_while_it_waits(folder: Path) -> None:
    with small_disk(folder / "small", 16 * MIB) as small:
        picture = Picture(64 * MIB)
        base = create(small / "base.qcow2", picture.size)
        top = create(folder / "top.qcow2", picture.size, backing=base)
        write(top, [Write(0, 8 * MIB, 0x21)])
        picture.fill(0, 8 * MIB, 0x21)
        fill(small / "filler")
        chain = Chain([base, top], [Picture(picture.size), picture])
        async with host_of(folder, chain) as (d, _):
            words = ("--pivot", "--on-error", "stop", "--override", "free-space")
            process = await start(through(d), "commit", "web1", "top", *words)
            assert process.stderr is not None
            async with asyncio.timeout(60):
                line = await process.stderr.readline()
            assert f"the storage under {base} failed or is full".encode() in line
            (small / "filler").unlink()
            said = await end(process)
            assert said.status == 0
            assert f"now writes to {base}" in said.out
        copied = shutil.copy(base, folder / "copied.qcow2")  # where there is room to read it
    assert_disk(Path(copied), picture)


# -- usage -----------------------------------------------------------------------------------------

WRONG = {
    "offline": ["--daemon", "commit", "--offline", "/x.qcow2", "--pivot"],
    "demo": ["--daemon", "demo"],
    "a group's hold": ["--daemon", "commit", "web1", "vda", "vdb", "--hold"],
    "the daemon itself": ["--daemon", "daemon", "--config", "/x"],
    "a bad address": ["--daemon=tcp:nowhere", "chain", "web1"],
    "an empty address": ["--daemon", "tcp:", "chain", "web1"],
    "a long address": ["--daemon", "/" + "x" * 200, "chain", "web1"],
    "no command": ["--daemon", "/x"],
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG.keys())
def test_wrong_usage(words: list[str]) -> None:
    said = qmpcommit(*words)
    assert (said.status, said.out) == (2, "")
    assert said.err.startswith("qmpcommit: ")
    assert qmpcommit(*words, "--json").error["type"] in ("UsageError", "InvalidRequest")


@pytest.mark.parametrize(
    "words", [["--daemon"], ["--daemon", "/nowhere/d.sock"], ["--daemon=d.sock"]], ids=" ".join
)
def test_where_the_daemon_is(words: list[str], folder: Path) -> None:
    default = str(folder / "default.sock")
    said = qmpcommit(*words, "chain", "web1", "--json", QMPCOMMIT_DAEMON=default)
    assert (said.status, said.error["type"]) == (4, "DaemonUnreachable")
    given = {1: words[0].partition("=")[2] or default, 2: words[-1]}[len(words)]
    assert said.error["address"] == given


async def test_what_the_daemon_refuses(folder: Path) -> None:
    chain = make_chain(folder)
    async with host_of(folder, chain) as (d, qemu):
        for hook in (["--only-if", "true"], ["--check", "true"], ["--on-pivot", "true"]):
            policy = [] if hook[0] == "--check" else ["--pivot"]
            said = await run(through(d), "commit", "web1", "top", *policy, *hook, "--json")
            assert (said.status, said.error["type"]) == (2, "InvalidRequest")
            assert "commands = true" in said.error["message"]
        for name in ("web2", qemu.qmp):
            said = await run(through(d), "commit", name, "top", "--pivot", "--json")
            assert (said.status, said.error["type"]) == (4, "VMNotFound")
        assert (await d.get("/v1/commits")).json == []
    assert_disk(chain.top, chain.pictures[-1])


async def test_without_a_daemon_nothing_of_its_client_is_imported(folder: Path) -> None:
    chain = make_chain(folder)
    async with machine(folder, chain) as qemu:
        seen = imported("commit", qemu.qmp, "vda", "--pivot", "--json")
        assert not {name for name in seen if name == "h11" or "qmpcommit.client." in name}
        await qemu.quit()
    assert_disk(chain.base, chain.pictures[-1])
