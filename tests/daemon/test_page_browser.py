"""The daemon's page in a real browser: seen, and decided by keyboard, on a real storage daemon.

It needs Chromium (Debian's package) and the extra ``page``: ``./tests/run.sh --page`` brings both.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from qmpcommit import manual
from tests.daemon.daemons import Daemon, host_of
from tests.daemon.test_page import READER, opened
from tests.ground.images import assert_disk, make_chain
from tests.ground.machines import storage_daemon

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip(
    "playwright.async_api", reason="a browser is not driven here: ./tests/run.sh --page"
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: ./tests/run.sh --page"),
    pytest.mark.timeout(180),
]

VIEWS = ("", "#schedules", "#log", "#manual/daemon")
MARKUP = "<img src=x onerror=alert(1)>"
"""As part of a file's name: it is shown, and not obeyed."""


@asynccontextmanager
async def browsed(
    d: Daemon, *through: str, restarts: bool = False, **more: str
) -> AsyncIterator[Any]:
    """The page, opened as a person would; it must ask nobody else, and complain of nothing.

    A browser says of each request that failed that it did, as those do while the daemon `restarts`.
    """
    complaints: list[str] = []
    hosts: set[str] = set()
    async with (
        opened(d, *through, **more) as (url, port),
        playwright.async_playwright() as driver,
    ):
        browser = await driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000
        )
        page = await browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        page.on("console", lambda said: complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        await page.goto(url)
        await page.locator("#live .good").wait_for()
        secret = page.url.removeprefix(f"http://127.0.0.1:{port}/").removesuffix("/ui")
        assert re.fullmatch(r"[\w-]{40,}", secret), "it went elsewhere, or the token is there still"
        assert not await page.context.cookies(), "every port of a host gets its cookies"
        yield page
        await browser.close()
    if restarts:
        complaints = [each for each in complaints if "Failed to load resource" not in each]
    assert hosts == {f"127.0.0.1:{port}"}
    assert not complaints


async def reach(page: Any, name: str) -> None:
    """Press Tab until the button has the focus."""
    for _ in range(60):
        await page.keyboard.press("Tab")
        if await page.evaluate("document.activeElement.textContent") == name:
            return
    raise AssertionError(f"'{name}' is not reached by keyboard")


async def test_a_commit_is_decided_by_keyboard_after_a_question(folder: Path) -> None:
    files = folder / MARKUP
    files.mkdir()
    chain = make_chain(files)
    async with host_of(folder, chain) as (d, _), browsed(d) as page:
        layers = page.locator(".chain li .file")
        await layers.nth(1).wait_for()
        assert await layers.all_text_contents() == [str(chain.top), str(chain.base)]
        commit = await d.commit("web1", disk="top", policy={"kind": "hold"})
        card = page.locator(f"[data-commit='{commit}']")
        await card.get_by_text("READY for").wait_for()
        assert await page.title() == "(1 READY) qmpcommit on " + await page.inner_text("#where")
        await page.get_by_text("holds all of it").wait_for()
        before = await card.locator(".age strong").inner_text()
        await page.wait_for_function(
            "old => document.querySelector('.age strong').textContent !== old", arg=before
        )
        # The first thing that Enter does is a question, and leaving it decides nothing.
        await reach(page, "Pivot top of web1 …")
        await page.keyboard.press("Enter")
        question = page.get_by_role("dialog", name="Pivot top of web1")
        await question.wait_for()
        assert str(chain.base) in await question.inner_text()
        assert await page.evaluate("document.activeElement.textContent") == "Leave it as it is"
        await page.keyboard.press("Enter")
        await question.wait_for(state="hidden")
        assert await page.evaluate("document.activeElement.textContent") == "Pivot top of web1 …"
        await page.keyboard.press("Enter")
        await page.keyboard.press("Escape")
        await question.wait_for(state="hidden")
        still = (await d.get(f"/v1/commits/{commit}")).json
        assert (still["phase"], still["decision"]) == ("ready", None)
        await page.keyboard.press("Enter")
        await question.wait_for()
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        ended = await d.end_of(commit)
        assert (ended["outcome"]["action"], ended["decision"]) == ("pivot", "pivot")
        await card.wait_for(state="detached")
        await page.locator(".chain li").nth(1).wait_for(state="detached")
        assert await layers.all_text_contents() == [str(chain.base)]
        await page.locator(".ended summary").click()
        assert str(chain.top) in await page.locator(".ended li").inner_text()
    assert_disk(chain.base, chain.pictures[-1])


SCHEDULES = """
[[vm]]
name = "db1"
qmp = "{folder}/db1/qmp"
[[vm]]
name = "mail"
qmp = "{folder}/mail/qmp"
[[flatten]]
vm = "web*"
keep = 2
depth = 9
[[cycle]]
vm = "db1"
disk = "vda"
at = "03:00"
keep_if = ["/bin/false"]
guest = "stop"
"""


async def test_it_is_narrow_dark_and_light_and_has_no_serious_fault(folder: Path) -> None:
    found = importlib.util.find_spec("axe_playwright_python")
    assert found is not None
    assert found.origin is not None
    axe = (Path(found.origin).parent / "axe.min.js").read_text()
    chains = {}
    for name in ("web1", "db1", "mail"):
        (folder / name).mkdir()
        chains[name] = make_chain(folder / name)
    async with (
        storage_daemon(folder / "db1", chains["db1"]),
        storage_daemon(folder / "mail", chains["mail"]),
        host_of(folder, chains["web1"], SCHEDULES.format(folder=folder)) as (d, _),
        browsed(d) as page,
    ):
        await d.connected("db1")
        await d.connected("mail")
        disks = [{"vm": "web1", "disk": "top"}, {"vm": "db1", "disk": "top"}]
        group = await d.post("/v1/groups", {"members": disks, "policy": {"kind": "hold"}})
        window = await d.post("/v1/vms/mail/windows", {"disks": ["top"], "lease": 600})
        assert (group.status, window.status) == (202, 201)
        card = page.locator("article.asks", has_text="Group of 2 disks")
        await card.get_by_text("READY for").nth(1).wait_for()
        await page.get_by_text("its lease ends in 9 min").wait_for()
        await page.get_by_text("stands still in a window").wait_for()
        await page.evaluate(axe)
        for width, scheme in ((1280, "light"), (360, "dark")):
            await page.set_viewport_size({"width": width, "height": 800})
            await page.emulate_media(color_scheme=scheme)
            for view in VIEWS:
                await page.evaluate("to => { location.hash = to }", view)
                name = view.strip("#").partition("/")[0] or "overview"
                await page.locator(f"main.view-{name} h2").first.wait_for()
                assert await page.evaluate("document.documentElement.scrollWidth") == width, view
                seen = await page.evaluate("axe.run()")
                serious = [
                    (each["id"], [node["html"] for node in each["nodes"]])
                    for each in seen["violations"]
                    if each["impact"] in ("serious", "critical")
                ]
                assert not serious, (width, view)
        for topic in manual.TOPICS:
            await page.evaluate("to => { location.hash = to }", f"#manual/{topic}")
            title = manual.page(topic).partition("\n")[0].removeprefix("# ").replace("`", "")
            await page.locator(".page h2", has_text=title).wait_for()
        await page.evaluate("location.hash = '#schedules'")
        await page.get_by_text("more than 9 layers").wait_for()
        await page.get_by_text("daily at 03:00 of the daemon's host").wait_for()
        await page.evaluate("location.hash = ''")
        await d.request("DELETE", f"/v1/windows/{window.json['id']}")
        await d.post(f"/v1/groups/{group.json['id']}/decision", {"action": "keep"})
        await page.locator(".ended li", has_text="window on mail").wait_for()
        ended = page.locator(".ended li", has_text="group: top of web1, top of db1")
        await ended.locator("summary").click()
        held = await ended.locator(".facts div", has_text="I/O held").inner_text()
        assert "top of web1: " in held
        assert "top of db1: " in held


async def test_it_goes_on_with_the_next_daemon(folder: Path) -> None:
    chain = make_chain(folder)
    async with host_of(folder, chain) as (d, _), browsed(d, restarts=True) as page:
        commit = await d.commit("web1", disk="top", policy={"kind": "hold"})
        await page.get_by_text("READY for").wait_for()
        await d.kill()
        await page.locator("#live .wrong").wait_for()
        await d.start()
        await page.locator("#live .good").wait_for()
        await d.post(f"/v1/commits/{commit}/decision", {"action": "keep"})
        await d.end_of(commit)
        await page.locator(".ended summary", has_text="keep").wait_for()
        await page.get_by_role("link", name="Log").click()
        # What was told before and after is told once, by events alone.
        ended = page.locator(".log li", has_text="top, done, finished, keep")
        await ended.wait_for()
        assert await page.locator(".log li", has_text="top, queued").count() == 1


async def test_a_reader_has_nothing_to_press(folder: Path, free_port: int) -> None:
    token = folder / "token"
    token.write_text(READER)
    token.chmod(0o600)
    access = f'[[access.grant]]\nrole = "read"\ntokens = ["{token}"]\n'
    listen = f'[listen]\ntcp = "127.0.0.1:{free_port}"\n'
    chain = make_chain(folder)
    through = f"--daemon=tcp:127.0.0.1:{free_port}"
    async with (
        host_of(folder, chain, access, listen) as (d, _),
        browsed(d, through, QMPCOMMIT_TOKEN_FILE=str(token)) as page,
    ):
        commit = await d.commit("web1", disk="top", policy={"kind": "hold"})
        await page.get_by_text("READY for").wait_for()
        await page.get_by_text("deciding needs the role 'operate' here").wait_for()
        assert await page.locator("main button").count() == 0
        await d.post(f"/v1/commits/{commit}/decision", {"action": "keep"})
        await page.locator(".ended summary", has_text="keep").wait_for()
        assert (await d.end_of(commit))["outcome"]["action"] == "keep"
