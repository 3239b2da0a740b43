"""The daemon's page: its files, who may see it and ask, and what brings it to a browser."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from qmpcommit import manual
from qmpcommit.cli.relay import MANY
from qmpcommit.daemon.page_api import FILES
from tests.cli.command import end, start
from tests.daemon.daemons import Answer, Daemon, daemon
from tests.daemon.test_access import NOBODY, needs_root

FOLDER = Path(manual.__file__).parent.parent / "daemon" / "page"
OFF = '[[vm]]\nname = "off"\nqmp = "/nowhere/qmp"\nconnect = "on-demand"\n'
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
READER, OPERATOR = "0123456789abcdef-reads", "0123456789abcdef-operates"


STRANGER = f"""
import os, socket, sys
os.setgid({NOBODY})
os.setuid({NOBODY})
port, path = int(sys.argv[1]), sys.argv[2]
sock = socket.socket()
sock.connect(("127.0.0.1", port))
sock.sendall(f"GET {{path}} HTTP/1.1\\r\\nHost: 127.0.0.1:{{port}}\\r\\n\\r\\n".encode())
while data := sock.recv(65536):
    sys.stdout.buffer.write(data)
"""


async def asked(
    port: int, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> Answer:
    """One request with these very headers, over TCP, read to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        given = {"Host": f"127.0.0.1:{port}", "Connection": "close", **headers}
        if body:
            given["Content-Length"] = str(len(body))
        lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in given.items() if v)]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        async with asyncio.timeout(30):
            text = await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    head, _, content = text.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    found = {n.lower(): v for n, v in (line.split(": ", 1) for line in rest)}
    return Answer(int(first.split()[1]), found, content)


def test_the_files_name_no_other_host_and_read_no_markup() -> None:
    assert {path.name for path in FOLDER.iterdir()} == FILES.keys()
    for name in FILES:
        text = (FOLDER / name).read_text()
        named = re.findall(r"(?:[a-z]+:)?//[\w.-]+\.[a-z]+", re.sub(r"(?m)^\s*//.*$", "", text))
        assert set(named) <= {"http://www.w3.org"}, name  # SVG's name, which nobody asks
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                    "Function(", "DOMParser", "createContextualFragment", "srcdoc"):  # fmt: skip
            assert way not in text, name
    text = (FOLDER / "index.html").read_text()
    assert not re.findall(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=\"ui/)", text)
    assert set(re.findall(r"(?:src|href)=\"([^\"#]+)", text)) <= {f"ui/{name}" for name in FILES}
    for name in FILES:
        if name.endswith(".js"):
            for source in re.findall(r'from "([^"]+)"', (FOLDER / name).read_text()):
                assert source.removeprefix("./") in FILES


async def test_the_files_are_served_and_asked_for_again(folder: Path) -> None:
    async with daemon(folder, OFF) as d:
        pages = {"/ui": FILES["index.html"], **{f"/ui/{n}": t for n, t in FILES.items()}}
        del pages["/ui/index.html"]
        pages |= {f"/ui/manual/{each}.md": "text/plain; charset=utf-8" for each in manual.TOPICS}
        for path, kind in pages.items():
            answer = await d.get(path)
            assert (answer.status, answer.headers["content-type"]) == (200, kind)
            assert answer.headers["content-security-policy"] == POLICY
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache, private"
            tag = {"If-None-Match": answer.headers["etag"]}
            again = await d.request("GET", path, headers=tag)
            assert (again.status, again.body) == (304, b"")
        topics = (await d.get("/ui/manual.json")).json
        assert [each["name"] for each in topics] == list(manual.TOPICS)
        for path in ("/ui/", "/ui/page_api.py", "/ui/../api.py", "/ui/manual/roff.py", "/ui/%00"):
            assert (await d.get(path)).status == 404
        assert (await d.post("/ui", {})).status == 405
        document = (await d.get("/openapi.json")).json
        assert not [path for path in document["paths"] if path.startswith("/ui")]


async def test_a_reader_sees_it_and_may_not_decide(folder: Path, free_port: int) -> None:
    for name, text in (("r", READER), ("o", OPERATOR)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    access = "".join(
        f'[[access.grant]]\nrole = "{role}"\ntokens = ["{folder}/{name}"]\n'
        for name, role in (("r", "read"), ("o", "operate"))
    )
    listen = f'[listen]\ntcp = "127.0.0.1:{free_port}"\n'
    async with daemon(folder, OFF + access + listen) as d:
        reads = {"Authorization": f"Bearer {READER}"}
        operates = {"Authorization": f"Bearer {OPERATOR}"}
        for path in ("/ui", "/ui/app.js", "/ui/asker.json"):
            assert (await asked(free_port, "GET", path, {})).status == 401
            assert (await asked(free_port, "GET", path, reads)).status == 200
        who = (await asked(free_port, "GET", "/ui/asker.json", reads)).json
        assert (who["role"], who["operates"]) == ("read", [])
        who = (await asked(free_port, "GET", "/ui/asker.json", operates)).json
        assert (who["role"], who["operates"]) == ("operate", ["off"])
        decision, kind = b'{"disk": "a"}', {"Content-Type": "application/json"}
        path = "/v1/vms/off/commits"
        assert (await asked(free_port, "POST", path, {**reads, **kind}, decision)).status == 403
        assert (await asked(free_port, "POST", path, {**operates, **kind}, decision)).status == 503
        # What a stranger's page has a browser send is refused, whoever's token came with it.
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": f"http://127.0.0.1:{free_port + 1}"},
        ):
            answer = await asked(free_port, "GET", "/v1/vms", {**operates, **headers})
            assert answer.status == 403, headers
        for host in ("evil.example", f"evil.example:{free_port}", "127.0.0.1.evil.example"):
            assert (await asked(free_port, "GET", "/ui", {"Host": host})).status == 403
            proxied = await asked(free_port, "GET", "/ui", {**operates, "Host": host})
            assert proxied.status == 200
        for headers in (
            {"Host": f"localhost:{free_port}", "Origin": f"http://localhost:{free_port}"},
            {"Host": "[::1]"},
        ):
            assert (await asked(free_port, "GET", "/ui", {**operates, **headers})).status == 200
        # A tunnel that leads a browser to the Unix socket has the rights of whoever made it.
        for origin, status in (("http://evil.example", 403), ("http://localhost", 200)):
            answer = await d.request("GET", "/v1/vms", headers={"Origin": origin})
            assert answer.status == status
        rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
        assert (await d.request("DELETE", "/v1/vms/off", headers=rebound)).status == 403


@asynccontextmanager
async def opened(d: Daemon, *through: str, **more: str) -> AsyncIterator[tuple[str, int]]:
    """``qmpcommit ui``: the address that it printed, and its port; it ends in order."""
    words = (*(through or (f"--daemon={d.socket}",)), "ui", "--no-browser")
    async with started(*words, lines=1, **more) as (url,):
        yield url, urlsplit(url).port or 0


@asynccontextmanager
async def started(*words: str, lines: int, **more: str) -> AsyncIterator[list[str]]:
    """The command, with the first lines that it printed; it ends in order."""
    process = await start(*words, more=more)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            said = [(await process.stdout.readline()).decode().strip() for _ in range(lines)]
        yield said
        process.send_signal(signal.SIGINT)
        ended = await end(process)
        assert (ended.status, ended.err) == (0, "")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def entered(url: str) -> str:
    """The path that the address is exchanged for, which all paths of the page begin with."""
    parts = urlsplit(url)
    answer = await asked(parts.port or 0, "GET", f"{parts.path}?{parts.query}", {})
    assert answer.status == 200
    assert "set-cookie" not in answer.headers
    assert answer.headers["referrer-policy"] == "no-referrer"
    found = re.search(rb"0;url=(/[\w-]{40,})/ui\"", answer.body)
    assert found is not None
    return found[1].decode()


@pytest.mark.parametrize("used", [True, False])
async def test_a_browser_is_given_a_file_that_its_user_alone_reads(
    folder: Path, used: bool
) -> None:
    async with daemon(folder, OFF) as d:
        run = folder / "run"
        run.mkdir(0o700)
        more = {"BROWSER": "/bin/echo %s", "XDG_RUNTIME_DIR": str(run)}
        async with started(f"--daemon={d.socket}", "ui", lines=2, **more) as (url, given):
            file = Path(urlsplit(given).path)
            assert given == file.as_uri(), "every user of the host can read what this is given"
            assert file.parent.parent == run
            assert [each.stat().st_mode & 0o777 for each in (file.parent, file)] == [0o700, 0o600]
            assert f'content="0;url={url}"' in file.read_text()
            if used:
                await entered(url)
                assert not list(run.iterdir())
        assert not list(run.iterdir())


async def test_the_address_opens_once_and_for_one_browser(folder: Path) -> None:
    async with daemon(folder, OFF) as d, opened(d) as (url, port):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/ui\?token=[\w-]{40,}", url)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.2", port)  # this host's, and not only that port
        for path in ("/ui", "/ui?token=", "/ui?token=wrong", "/v1/vms", "/ui/app.js", "//ui"):
            assert (await asked(port, "GET", path, {})).status == 403
        base = await entered(url)
        assert (await asked(port, "GET", url.partition(str(port))[2], {})).status == 403
        page = await asked(port, "GET", f"{base}/ui", {})
        assert (page.status, page.headers["content-security-policy"]) == (200, POLICY)
        tag = {"If-None-Match": page.headers["etag"]}
        assert (await asked(port, "GET", f"{base}/ui", tag)).status == 304
        vms = await asked(port, "GET", f"{base}/v1/vms", {})
        assert (vms.json[0]["name"], vms.headers["referrer-policy"]) == ("off", "no-referrer")
        assert (await asked(port, "GET", f"{base}/v1/vms/x", {})).status == 404
        for path in ("/v1/vms", f"{base[:-1]}/v1/vms", f"/{base}/v1/vms", f"http://x{base}/v1/vms"):
            headers = {"Cookie": f"qmpcommit-{port}={base[1:]}"}
            assert (await asked(port, "GET", path, headers)).status == 403, path
        for headers in (
            {"Host": f"evil.example:{port}"},
            {"Host": "127.0.0.1"},
            {"Origin": "http://evil.example"},
            {"Origin": f"http://127.0.0.1:{port + 1}"},
            {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            assert (await asked(port, "GET", f"{base}/v1/vms", headers)).status == 403, headers


@needs_root
async def test_other_users_are_refused_though_they_know_the_address(folder: Path) -> None:
    async with daemon(folder, OFF) as d, opened(d) as (url, port):
        words = [sys.executable, "-c", STRANGER, str(port), url.partition(str(port))[2]]
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
        text, _ = await process.communicate()
        assert b" 403 " in text.partition(b"\r\n")[0]
        assert f"user {NOBODY} did not run this".encode() in text
        base = await entered(url)
        assert (await asked(port, "GET", f"{base}/v1/vms", {})).status == 200


async def test_what_is_sent_through_it_is_json_of_the_page(folder: Path) -> None:
    async with daemon(folder, OFF) as d, opened(d) as (url, port):
        base = await entered(url)
        ours, path = {"Origin": f"http://127.0.0.1:{port}"}, f"{base}/v1/vms"
        kind = {"Content-Type": "application/json"}
        new = json.dumps({"name": "web1", "qmp": "/x", "connect": "on-demand"}).encode()
        assert (await asked(port, "POST", path, ours, new)).status == 415
        text = {**ours, "Content-Type": "text/plain"}
        assert (await asked(port, "POST", path, text, new)).status == 415
        assert (await asked(port, "POST", path, kind, new)).status == 403
        assert (await asked(port, "PUT", path, {**ours, **kind}, new)).status == 405
        assert [each["name"] for each in (await d.get("/v1/vms")).json] == ["off"]
        assert (await asked(port, "POST", path, {**ours, **kind}, new)).status == 201
        assert (await asked(port, "DELETE", f"{path}/web1", ours)).status == 204
        for name in ("If-None-Match", "Last-Event-ID"):
            assert (await asked(port, "GET", path, {name: "\xe9"})).status == 400
        assert (await asked(port, "GET", path, {"Cookie": "of-another-server=\xe9"})).status == 200
        # Events pass as they come, however their path is written, from where the browser was.
        # Those that say nothing are never in the way of the page.
        async with events(port, f"{base}/v1/%65vents") as first:
            assert b'"change": "added"' in await first.readuntil(b'"added"')
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MANY + 1)]
            late = new.replace(b"web1", b"web2")
            assert (await asked(port, "POST", path, {**ours, **kind}, late)).status == 201
            assert b'"added"' in await first.readuntil(b'"web2"')
            for _, writer in silent:
                writer.close()
        # The daemon goes, and the browser is told so.
        assert await d.stop() == 0
        lost = await asked(port, "GET", path, {})
        assert (lost.status, lost.json["detail"][:10]) == (502, "the daemon")


@asynccontextmanager
async def events(port: int, path: str) -> AsyncIterator[asyncio.StreamReader]:
    """The stream of events from its beginning, behind its head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Last-Event-ID: 0", "", ""]
        writer.write("\r\n".join(lines).encode())
        async with asyncio.timeout(30):
            assert b"text/event-stream" in await reader.readuntil(b"\r\n\r\n")
            yield reader
    finally:
        writer.close()
        await writer.wait_closed()
