"""Lists in pages: what is asked for of them, and what they cost the loop."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from qmpcommit.daemon.journal import Journal, Statement
from qmpcommit.daemon.promise import Promise
from qmpcommit.wire.commit import CommitRequest, CommitView
from tests.daemon.daemons import Answer, Daemon, daemon
from tests.daemon.test_feed import serving

OFF = '[[vm]]\nname = "{}"\nqmp = "{}/nothing"\n'


async def many(journal: Journal, count: int) -> None:
    """So many commits have ended, the last of them last."""
    made = []
    for number in range(count):
        request = CommitRequest(disk=f"vd{'ab'[number % 2]}")
        promise = Promise(
            f"{number:032x}", f"web{number % 3}", request, f"qmpcommit-{number}",
            journal=journal, metrics=None,  # type: ignore[arg-type]
        )  # fmt: skip
        made.append(promise.insertion())
    ended = "UPDATE commits SET state = 'done', ended = created, created = 7.5"
    await journal.write(*made, Statement(ended))


def next_of(answer: Answer) -> str:
    """The path of the next page; empty for the last one."""
    link = answer.headers.get("Link", answer.headers.get("link", ""))
    assert not link or link.endswith('>; rel="next"')
    return link[1:].partition(">")[0]


async def test_a_list_is_read_in_pages_to_its_end(folder: Path) -> None:
    (folder / "state").mkdir()
    journal = await Journal(folder / "state" / "journal.db").open()
    await many(journal, 7)
    await journal.close()
    vms = "".join(OFF.format(name, folder) for name in ("a", "b", "c"))
    async with daemon(folder, vms) as d:

        async def all_of(path: str) -> list[list[Any]]:
            found = []
            while path:
                page = await d.get(path)
                assert page.status == 200, page.body
                found.append(page.json)
                path = next_of(page)
            return found

        numbers = [
            [int(each["id"], 16) for each in page] for page in await all_of("/v1/commits?limit=3")
        ]
        assert numbers == [[6, 5, 4], [3, 2, 1], [0]]
        (page,) = await all_of("/v1/commits?vm=web0&disk=vda&fields=id,vm")
        assert page == [{"id": f"{n:032x}", "vm": "web0"} for n in (6, 0)]
        assert await all_of("/v1/commits?state=failed&fields=id") == [[]]
        names = [[each["name"] for each in page] for page in await all_of("/v1/vms?limit=2")]
        assert names == [["a", "b"], ["c"]]
        assert (await d.get("/v1/vms?state=connected")).json == []
        for wrong in ("fields=colour", "fields=", "state=odd"):
            said = await d.get(f"/v1/commits?{wrong}")
            assert said.status == 422, wrong
        for path, kind in (("commits", "Commit"), ("windows", "Window"), ("groups", "Commit")):
            said = await d.get(f"/v1/{path}?after=0123")
            assert (said.status, said.json["type"]) == (404, f"urn:qmpcommit:{kind}NotFound")
        for path in ("/v1/windows", "/v1/groups"):
            asked = await d.get(f"{path}?vm=a&disk=vda&state=done&fields=id,state&limit=5")
            assert (asked.status, asked.json) == (200, [])


async def test_nothing_of_a_list_is_made_in_the_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: set[int] = set()
    load = Promise.load.__func__  # type: ignore[attr-defined]
    dump = CommitView.model_dump_json

    def loaded(*given: Any) -> Promise:
        made.add(threading.get_ident())
        return load(Promise, *given)  # type: ignore[no-any-return]

    def dumped(self: CommitView, **given: Any) -> str:
        made.add(threading.get_ident())
        return dump(self, **given)

    monkeypatch.setattr(Promise, "load", loaded)
    monkeypatch.setattr(CommitView, "model_dump_json", dumped)
    async with serving(folder) as engine:
        await many(engine.journal, 50)
        listed = await Daemon(folder, "").get("/v1/commits?limit=50")
        assert [int(each["id"], 16) for each in listed.json] == [*reversed(range(50))]
        assert made
        assert threading.get_ident() not in made
