"""The API's document is usable: a client that is generated from it can do what it says."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.daemons import daemon, host_of
from tests.ground.images import make_chain

GENERATOR = Path(sys.executable).parent / "openapi-python-client"

NAMES = "package_name_override: client\nproject_name_override: client\npost_hooks: []\n"

USE = """
import sys
sys.path.insert(0, sys.argv[1])
import httpx
import client as c
import client.models as m
from client.api.commits import commit, decide, get_commit
from client.api.vms import list_vms
link = c.Client(base_url="http://daemon")
way = httpx.HTTPTransport(uds=sys.argv[2])
link.set_httpx_client(httpx.Client(base_url="http://daemon", transport=way, timeout=20))
print([each.name for each in list_vms.sync(client=link)])
policy = m.Hold(kind="hold", otherwise=m.Keep(kind="keep"), timeout=50)
made = commit.sync("web1", client=link, body=m.CommitRequest(disk="top", policy=policy))
while made.phase != "ready":
    made = get_commit.sync(made.id, client=link)
decide.sync(made.id, client=link, body=m.Decision(action=m.DecisionAction.KEEP))
ended = get_commit.sync(made.id, client=link, wait=20.0)
print(ended.state, ended.outcome.action)
"""


def schemas_of(value: Any) -> Iterator[dict[str, Any]]:
    """All schemas in a part of the document."""
    if isinstance(value, list):
        for each in value:
            yield from schemas_of(each)
    elif isinstance(value, dict):
        yield value
        for name, each in value.items():
            if name not in ("example", "examples", "default"):
                yield from schemas_of(each)


async def test_the_document_is_valid_and_says_what_values_there_are(folder: Path) -> None:
    async with daemon(folder) as d:
        document = (await d.get("/openapi.json")).json
    validator = pytest.importorskip("openapi_spec_validator")
    validator.OpenAPIV31SpecValidator(document).validate()
    named: dict[str, Any] = {}
    for schema in schemas_of(document):
        assert not {"ge", "gt", "le", "lt"} & set(schema), f"no keywords of JSON Schema: {schema}"
        named.update(schema["properties"] if isinstance(schema.get("properties"), dict) else {})
    for name in ("state", "phase", "decision", "role", "pace"):
        told = str(named[name])
        assert "enum" in told or "$ref" in told, name
    schemas = document["components"]["schemas"]
    for view, times in {
        "CommitView": ("created", "ready", "ended"),
        "GroupView": ("created", "ended"),
        "WindowView": ("created", "expires", "ended"),
        "RoundView": ("created", "ended"),
        "CycleView": ("next_round", "last_kept"),
        "RuleView": ("last_look", "next_look"),
    }.items():
        for each in times:
            assert "date-time" in str(schemas[view]["properties"][f"{each}_at"])
    assert "date-time" in str(schemas["LossView"]["properties"]["time"])
    refused = document["paths"]["/v1/vms"]["get"]["responses"]
    assert "Link" in refused["200"]["headers"]
    assert "WWW-Authenticate" in refused["401"]["headers"]
    assert "Retry-After" in refused["503"]["headers"]


async def test_what_it_shows_as_examples_is_what_it_says(folder: Path) -> None:
    """And it says where it is served and under which licence, which linters ask for."""
    async with daemon(folder) as d:
        document = (await d.get("/openapi.json")).json
    assert document["servers"][0]["url"] == "/"
    assert document["info"]["license"]["identifier"] == "MIT"
    jsonschema = pytest.importorskip("jsonschema")
    seen = 0
    for schema in schemas_of(document):
        shown = schema.get("examples", [])
        if "schema" in schema:  # a media type, or a parameter
            shown, told = [schema["example"]] if "example" in schema else [], schema["schema"]
        else:
            told = schema
        whole = {**told, "components": document["components"]}
        for each in shown if isinstance(shown, list) else ():
            jsonschema.Draft202012Validator(whole).validate(each)
            seen += 1
    assert seen > 100


async def test_a_time_is_told_in_both_forms(folder: Path) -> None:
    async with host_of(folder, make_chain(folder)) as (d, _):
        asked = await d.commit("web1", disk="top", policy={"kind": "keep"})
        ended = await d.end_of(asked)
        (listed,) = (await d.get("/v1/commits")).json
        for view in (ended, listed):
            for name in ("created", "ended"):
                told = datetime.fromisoformat(view[f"{name}_at"])
                assert told.timestamp() == pytest.approx(view[name], abs=1e-5)
        listed = (await d.get("/v1/commits?fields=created_at")).json
        assert listed == [{"created_at": ended["created_at"]}]


async def test_what_is_chosen_among_is_told_by_its_kind(folder: Path) -> None:
    async with daemon(folder) as d:
        document = (await d.get("/openapi.json")).json
    schemas = document["components"]["schemas"]
    for name in ("Pivot", "Keep", "Abort", "Hold", "Check", "Recycle"):
        assert "kind" in schemas[name]["required"]
        assert "default" not in schemas[name]["properties"]["kind"]
    for schema in schemas_of(schemas):
        assert not isinstance(schema.get("default"), dict) or "properties" in schema
        named = [str(each.get("$ref", "")).rpartition("/")[2] for each in schema.get("anyOf", ())]
        assert not {"Pivot", "Keep"} & set(named), "a choice without a discriminator"
    assert "ready" in schemas["CommitView"]["properties"]["phase"]["enum"]
    made = document["paths"]["/v1/vms/{vm}/commits"]["post"]["responses"]["202"]
    assert set(made["headers"]) == {"Location", "Idempotent-Replay"}


@pytest.mark.skipif(not GENERATOR.exists(), reason="openapi-python-client is not installed")
async def test_a_generated_client_commits(folder: Path) -> None:
    async with host_of(folder, make_chain(folder)) as (d, _):
        (folder / "openapi.json").write_bytes((await d.get("/openapi.json")).body)
        (folder / "names.yml").write_text(NAMES)
        words = [str(GENERATOR), "generate", "--path", "openapi.json", "--config", "names.yml"]
        words += ["--output-path", "made", "--meta", "poetry", "--fail-on-warning"]
        status, said = await asyncio.to_thread(run, words, folder)
        assert status == 0, said
        words = [sys.executable, "-c", USE, str(folder / "made"), d.socket]
        status, said = await asyncio.to_thread(run, words, folder)
        assert said.splitlines() == ["['web1']", "done keep"]


def run(words: list[str], folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout
