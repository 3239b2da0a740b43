"""What is seen at the front door: names, signatures, help."""

from __future__ import annotations

import importlib
import inspect
import pydoc
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest

import qmpcommit as qc
from qmpcommit.callback import said_of
from qmpcommit.client.problems import error_from
from qmpcommit.commit import phases
from qmpcommit.guest import hold
from qmpcommit.window import run


def test_commit_is_a_function_with_a_signature_and_help() -> None:
    assert inspect.isfunction(qc.commit)
    assert inspect.iscoroutinefunction(qc.commit)
    signature = inspect.signature(qc.commit)
    assert list(signature.parameters)[:2] == ["address", "disk"]
    assert signature.parameters["shallow"].default is False
    assert signature.parameters["policy"].annotation == "AskedPolicy | None"
    assert signature.parameters["ledger"].kind is inspect.Parameter.KEYWORD_ONLY
    text = pydoc.plain(pydoc.render_doc(qc.commit))
    assert "carry_bitmaps: bool = True" in text.replace("'", "")  # which Pythons differ in
    assert "Commit one disk from start to end" in text


def test_commit_is_that_function_whatever_is_imported_and_its_package_is_found_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = (
        "import qmpcommit.commit.policy, inspect, qmpcommit as qc; qc.Pivot();"
        " import qmpcommit.commit.phases as phases;"
        " from qmpcommit import commit;"
        " assert inspect.isfunction(commit) and commit is qc.commit;"
        " assert qmpcommit.commit.phases is phases;"
        " assert 'policy' in inspect.signature(qc.commit).parameters"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert importlib.import_module("qmpcommit.commit").__path__
    monkeypatch.setattr("qmpcommit.commit.phases.MAX_TRIES", 99)
    assert phases.MAX_TRIES == 99


def test_what_the_stub_names_is_what_there_is() -> None:
    stub = Path(qc.__file__).with_suffix(".pyi").read_text()
    named = set(re.findall(r"^from qmpcommit\S* import (\w+) as \1$", stub, re.M))
    former = {
        name: (run, f"vm.{name}") for name in ("open_window", "close_window", "recover_window")
    }
    former["quiesced"] = (hold, "qmpcommit.freeze")
    assert named == set(dir(qc)) - {"__version__"}
    for name, (home, now) in former.items():
        with pytest.warns(DeprecationWarning, match=rf"is {re.escape(now)}\(\.\.\.\) now") as told:
            assert getattr(qc, name) is getattr(home, name)
        assert told[0].filename == __file__
    for name in dir(qc):
        getattr(qc, name)


async def test_options_are_taken_by_their_former_names() -> None:
    """Each idea has one word: agents, overlay, freeze."""
    vm = qc.Session.connect("/run/nobody")
    agents = {"agent": "/run/agent"}
    calls: list[tuple[Any, dict[str, Any]]] = [
        (vm.snapshot, {"disks": ["vda"], "overlay_dir": "/vms", **agents}),
        (vm.open_window, {"disks": ["vda"], "overlay_dir": "/vms", **agents}),
        (vm.close_windows, {"overlay_dir": "/vms", **agents}),
        (vm.overlay, {"disks": ["vda"], **agents}),
        (vm.commit_group, {"disks": ["vda"], **agents}),
        (vm.recover, agents),
        (vm.cycle, {"disk": "vda", "keep_if": None, **agents}),
        (vm.cycles, {"disk": "vda", "keep_if": None, "every": 1, **agents}),
        (qc.freeze, {"vm": vm, "how": "agent", **agents}),
        (qc.snapshot, {"disks": [], "overlay_dir": "/vms"}),
        (
            qc.Client("/run/d").vm("web1").snapshot,
            {"disks": ["vda"], "overlay_dir": "/v", **agents},
        ),
        (qc.Client("/run/d").snapshot, {"disks": [], "overlay_dir": "/v"}),
    ]
    for call, options in calls:
        with pytest.warns(DeprecationWarning, match="goes with the next version") as told:
            made = call(**options)
        if inspect.iscoroutine(made):
            made.close()
        words = [str(each.message) for each in told]
        former = [name for name in ("agent", "overlay_dir") if name in options]
        assert sorted(word.partition("=")[0] for word in words) == former
        assert {each.filename for each in told} == {__file__}
        assert not {"agent", "overlay_dir"} & inspect.signature(call).parameters.keys()
    with pytest.raises(TypeError, match="both agents and agent"):
        calls[3][0](["vda"], agents="/a", **agents)


def test_each_error_says_who_is_to_do_something_and_where() -> None:
    kinds = [kind for name in dir(qc) if isinstance(kind := getattr(qc, name), type)]
    for kind in kinds:
        if issubclass(kind, qc.QmpCommitError) and kind is not qc.QmpCommitError:
            bases = [issubclass(kind, base) for base in (qc.RequestError, qc.OperationError)]
            assert sum(bases) == 1, kind
    assert issubclass(qc.InvalidRequest, ValueError)
    assert issubclass(qc.SessionClosed, qc.MonitorLost)
    assert issubclass(qc.RemoteJobDetached, qc.DaemonLost)
    error = qc.JobDetached("it goes on", vm="web1", disk="vda", outcome={"action": "pivot"})
    assert repr(error) == "JobDetached('it goes on', vm='web1', disk='vda')"
    session = qc.Session.connect("/run/q", name="web1")
    assert repr(session) == "<Session 'web1', address='/run/q', not connected>"
    assert repr(qc.Client("/run/d").vm("web1")) == "<RemoteVM 'web1' of the daemon at '/run/d'>"
    assert repr(qc.Window("w", {})) == "<Window w over nothing>"


def test_what_a_person_types_is_a_hint_and_is_lost_nowhere() -> None:
    error = qc.JobConflict("it has a job. Nothing was sent", hint="See 'qmpcommit jobs'", vm="web1")
    assert (error.message, error.hint) == ("it has a job. Nothing was sent", "See 'qmpcommit jobs'")
    assert str(error) == said_of(error) == "it has a job. Nothing was sent. See 'qmpcommit jobs'"
    described = error.to_dict()
    assert (described["message"], described["hint"]) == (str(error), error.hint)
    for again in (error.again(), error_from(described)):
        assert (str(again), again.message, again.hint) == (str(error), error.message, error.hint)
        assert again.facts == {"vm": "web1"}
    plain = qc.JobConflict("it has a job")
    assert (plain.hint, "hint" in plain.to_dict()) == (None, False)


def test_commit_can_be_replaced_as_in_a_test_of_a_program() -> None:
    real = qc.commit
    with mock.patch("qmpcommit.commit", "replaced"):
        assert cast(object, qc.commit) == "replaced"
        importlib.import_module("qmpcommit.commit")
        assert cast(object, qc.commit) == "replaced"
    assert qc.commit is real
