"""The daemon under systemd: readiness, the watchdog, its sockets, units; and how it is watched."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from tests.cli.command import qmpcommit
from tests.daemon.daemons import Daemon, daemon
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import storage_daemon

SYSTEM = files("qmpcommit.daemon").joinpath("system")


async def heard(sock: socket.socket) -> str:
    async with asyncio.timeout(30):
        return (await asyncio.get_running_loop().sock_recv(sock, 4096)).decode()


@pytest.mark.parametrize("abstract", [False, True])
async def test_systemd_is_told_when_it_serves_lives_and_stops(folder: Path, abstract: bool) -> None:
    address = f"@qmpcommit-{folder.name}" if abstract else f"{folder}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if abstract else address)
        sock.setblocking(False)
        made = Daemon(folder, "", {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"})
        process = await made.launch()
        try:
            said = [await heard(sock)]
            while "READY=1" not in said:
                said.append(await heard(sock))
            assert (await made.get("/readyz")).status == 200, "it serves when it says so"
            for _ in range(3):
                assert await heard(sock) == "WATCHDOG=1"
            process.terminate()
            while "STOPPING=1" not in said:
                said.append(await heard(sock))
            assert await process.wait() == 0
            assert said.count("READY=1") == 1
        finally:
            if process.returncode is None:
                await made.kill()


async def test_a_watchdog_of_another_process_is_not_fed(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{folder}/notify")
        sock.setblocking(False)
        environment = {"NOTIFY_SOCKET": f"{folder}/notify", "WATCHDOG_USEC": "100000",
                       "WATCHDOG_PID": "1"}  # fmt: skip
        async with daemon(folder, **environment) as d:
            assert await heard(sock) == "READY=1"
            assert await d.stop() == 0
            assert await heard(sock) == "STOPPING=1"


async def test_requests_wait_in_systemds_socket_while_the_daemon_is_replaced(
    folder: Path, free_port: int
) -> None:
    token = folder / "token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    tcp = f'[listen]\ntcp = "127.0.0.1:{free_port}"\ntoken_file = "{token}"\n'
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{folder}/d.sock")
        sock.listen()
        shell = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{sock.fileno()}'
        made = Daemon(folder, tcp, through=("bash", "-c", shell, "sh"), fds=[sock.fileno()])
        early = asyncio.create_task(made.get("/v1/vms"))  # before there is a daemon
        await made.start()
        try:
            assert (await early).status == 200
            port = {"Authorization": "Bearer 0123456789abcdef"}
            _, writer = await asyncio.open_connection("127.0.0.1", free_port)
            writer.close()
            await writer.wait_closed()
            assert (await made.request("GET", "/v1/vms", None, port)).status == 200
            assert await made.stop() == 0
            assert Path(made.socket).exists(), "it is systemd's"
            between = asyncio.create_task(made.get("/v1/vms"))
            await made.start()
            assert (await between).status == 200
            assert await made.stop() == 0
        finally:
            assert made.process is not None
            if made.process.returncode is None:
                await made.kill()


def test_the_units_are_there_and_are_what_systemd_takes(folder: Path) -> None:
    for name in ("qmpcommitd.service", "qmpcommitd.socket", "sysusers.conf", "tmpfiles.conf"):
        (folder / name).write_text(SYSTEM.joinpath(name).read_text())
    service = folder / "qmpcommitd.service"
    text = service.read_text()
    assert "Type=notify\n" in text
    assert "User=qmpcommit\n" in text
    assert "#LoadCredential=token:" in text
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    service.write_text(text.replace("/usr/bin/qmpcommitd", "/bin/true"))
    units = [str(service), str(folder / "qmpcommitd.socket")]
    done = subprocess.run(
        [analyze, "verify", "--man=no", *units], capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    wrong = [line for line in done.stderr.splitlines() if "qmpcommitd" in line]
    assert not wrong, done.stderr
    done = subprocess.run(
        [analyze, "security", "--offline=yes", "--threshold=15", str(service)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if "ould not" not in done.stderr:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_the_users_and_folders_are_what_systemd_takes(folder: Path) -> None:
    root = folder / "root"
    (root / "etc").mkdir(parents=True)
    for program, name in (("systemd-sysusers", "sysusers"), ("systemd-tmpfiles", "tmpfiles")):
        path = shutil.which(program)
        if path is None:
            pytest.skip(f"no {program}")
        target = root / f"usr/lib/{name}.d/qmpcommit.conf"
        target.parent.mkdir(parents=True)
        target.write_text(SYSTEM.joinpath(f"{name}.conf").read_text())
        more = ["--create"] if name == "tmpfiles" else []
        done = subprocess.run(
            [path, f"--root={root}", *more, str(target)], capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert "qmpcommit:" in (root / "etc/passwd").read_text()
    assert (root / "run/qmpcommit").is_dir()


def test_the_wheel_has_the_units() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["qmpcommit"]
    assert project["project"]["scripts"]["qmpcommitd"]


async def test_metrics_and_logs_tell_what_happened(folder: Path) -> None:
    chain = make_chain(folder)
    async with (
        storage_daemon(folder, chain) as qemu,
        daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n') as d,
    ):
        await d.connected("web1")
        held = await d.commit("web1", disk="top", policy={"kind": "hold"})
        await d.until(held, "ready")
        during = (await d.get("/metrics")).body.decode()
        assert 'qmpcommit_jobs{phase="ready"} 1.0' in during
        assert 'qmpcommit_vms{state="connected"} 1.0' in during
        await d.post(f"/v1/commits/{held}/decision", {"action": "abort"})
        await d.end_of(held)
        late = await d.commit("web1", disk="top", policy={"kind": "hold"}, timeout=0)
        assert (await d.end_of(late))["error"]["type"] == "DeadlineExceeded"
        done = await d.end_of(await d.commit("web1", disk="top", policy={"kind": "pivot"}))
        answer = await d.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = answer.body.decode()
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#")
        assert values['qmpcommit_commits_total{outcome="pivot",policy="pivot"}'] == "1.0"
        assert values['qmpcommit_commits_total{outcome="abort",policy="hold"}'] == "1.0"
        assert values['qmpcommit_commits_total{outcome="failed",policy="hold"}'] == "1.0"
        assert values['qmpcommit_failures_total{error="DeadlineExceeded"}'] == "1.0"
        assert float(values["qmpcommit_reaction_seconds_count"]) >= 1
        assert float(values['qmpcommit_phase_seconds_count{phase="copying"}']) >= 1
        assert float(values["qmpcommit_committed_bytes_total"]) > 0
        assert float(values["qmpcommit_journal_write_seconds_count"]) > 5
        assert float(values["qmpcommit_journal_records_total"]) > 5
        assert values["qmpcommit_journal_full"] == "0.0"
        for name in ("event_loop_lag_seconds", "reconnects_total"):
            assert f"qmpcommit_{name}" in values
        assert values['qmpcommit_http_requests_total{method="POST",status="202"}'] == "4.0"
        assert "qmpcommit_jobs{" not in text, "a phase that nobody is in any more"
        assert await d.stop() == 0
        lines = [json.loads(line) for line in d.log.splitlines()]
        of_job = [line for line in lines if line.get("job") == done["job_id"]]
        assert {line["event"] for line in of_job} >= {"accepted", "phase", "ended"}
        for line in of_job:
            assert (line["vm"], line["disk"]) == ("web1", "top")
            assert {"timestamp", "level"} <= set(line)
    assert_disk(chain.base, chain.pictures[-1])


async def test_each_line_of_the_log_is_json_whoever_writes_it(folder: Path) -> None:
    async with daemon(folder) as d:
        _, writer = await asyncio.open_unix_connection(d.socket)
        writer.write(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await d.raw(b"this is no HTTP\r\n\r\n")).status == 400
        assert await d.stop() == 0
        writer.close()
        await writer.wait_closed()
        lines = [json.loads(line) for line in d.log.splitlines()]
        assert "uvicorn.error" in {line.get("logger") for line in lines}
        assert all({"event", "level", "timestamp"} <= set(line) for line in lines)


@pytest.mark.parametrize("stderr", ["2>/dev/full", "2> >(exec 2>&-)", "2>&-"])
async def test_a_log_that_can_not_be_written_keeps_nothing_from_being_done(
    folder: Path, stderr: str
) -> None:
    through = ("bash", "-c", f'exec "$@" {stderr}', "bash")
    chain = make_chain(folder)
    async with storage_daemon(folder, chain) as qemu:
        d = Daemon(folder, f'[[vm]]\nname = "web1"\nqmp = "{qemu.qmp}"\n', through=through)
        try:
            await d.start()
            await d.connected("web1")
            done = await d.end_of(await d.commit("web1", disk="top", policy={"kind": "pivot"}))
            assert done["outcome"]["action"] == "pivot"
            assert await d.stop() == 0
            d.config = "commands = 7"
            assert await (await d.launch()).wait() == 2
        finally:
            assert d.process is not None
            if d.process.returncode is None:
                await d.kill()
    assert_disk(chain.base, chain.pictures[-1])


async def test_a_log_for_people(folder: Path) -> None:
    config = folder / "config.toml"
    config.write_text(f'state = "{folder}/state"\n[listen]\nsocket = "{folder}/d.sock"\n')
    said = qmpcommit("daemon", "--config", config, "--timeout", "0.2")
    assert said.status == 0
    assert "serving" in said.err
    assert said.out == ""
    assert not said.err.startswith("{")
