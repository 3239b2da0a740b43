"""What is watched from outside: which VMs are there, what waits for a decision, what grows."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import qmpcommit as qc
from qmpcommit.daemon.metrics import Metrics
from tests.daemon.daemons import Daemon, host_of
from tests.ground.images import make_chain

SYSTEM = Path(str(resources.files("qmpcommit.daemon"))) / "system"


async def metric(d: Daemon, name: str) -> dict[str, float]:
    """Its values by their labels."""
    text = (await d.get("/metrics")).body.decode()
    found = re.findall(rf"(?m)^{name}(?:\{{([^}}]*)\}})? (\S+)$", text)
    return {labels: float(value) for labels, value in found}


async def test_what_an_operator_watches(folder: Path) -> None:
    chain = make_chain(folder)
    off = f'[[vm]]\nname = "off"\nqmp = "{folder}/nothing"\n'
    async with host_of(folder, chain, off) as (d, _):
        (build,) = await metric(d, "qmpcommit_build_info")
        assert f'version="{qc.__version__}"' in build
        assert await metric(d, "qmpcommit_vm_up") == {'vm="web1"': 1.0, 'vm="off"': 0.0}
        assert (await metric(d, "process_open_fds"))[""] > 0
        assert (await metric(d, "qmpcommit_journal_bytes"))[""] > 4096
        assert await metric(d, "qmpcommit_oldest_ready_job_seconds") == {}
        asked = await d.commit("web1", disk="top", policy={"kind": "hold"})
        await d.until(asked, "ready")
        (waits,) = (await metric(d, "qmpcommit_oldest_ready_job_seconds")).items()
        assert waits[0] == 'vm="web1"'
        assert 0 <= waits[1] < 60
        await d.post(f"/v1/commits/{asked}/decision", {"action": "keep"})
        await d.end_of(asked)
        assert await metric(d, "qmpcommit_oldest_ready_job_seconds") == {}
        window = (await d.post("/v1/vms/web1/windows", {"disks": ["top"]})).json
        assert list(await metric(d, "qmpcommit_oldest_open_window_seconds")) == ['vm="web1"']
        await d.request("DELETE", f"/v1/windows/{window['id']}")
        assert (await d.get(f"/v1/windows/{window['id']}?wait=20")).json["state"] == "done"
        assert await metric(d, "qmpcommit_oldest_open_window_seconds") == {}
        answered = await metric(d, "qmpcommit_http_request_seconds_count")
        assert answered['method="POST"'] == 3.0
        assert answered['method="DELETE"'] == 1.0
        assert "" in await metric(d, "qmpcommit_event_loop_lags_seconds_count")


def names_in(text: str) -> set[str]:
    """The metrics that an expression, or a file of them, names."""
    return set(re.findall(r"\b(?:qmpcommit|process)_[a-z_]+[a-z]\b", text))


def test_rules_and_dashboard_name_metrics_that_there_are() -> None:
    told = Metrics().text().decode()
    there = set()
    for name, kind in re.findall(r"(?m)^# TYPE (\S+) (\S+)$", told):
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        there |= {f"{name}{end}" for end in ends}
    dashboard = json.loads(SYSTEM.joinpath("dashboard.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown += [each["definition"] for each in dashboard["templating"]["list"][1:]]
    rules = re.findall(r"(?m)^ +expr: (.*)$", SYSTEM.joinpath("alerts.yml").read_text())
    for text in (*shown, *rules):
        assert names_in(text) <= there, text
        assert names_in(text) or text.startswith("up{"), text
    manual = resources.files("qmpcommit").joinpath("manual", "metrics.md").read_text()
    named = {f"qmpcommit_{each}" for each in re.findall(r"(?m)^\| `([a-z_]+)` \|", manual)}
    ours = {each for each in there if each.startswith("qmpcommit_")}
    assert named == {re.sub("_(bucket|sum|count)$", "", each) for each in ours}
