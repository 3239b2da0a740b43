"""What commands are told of a commit: only names that lead to QEMU's own files from here."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

import qmpcommit as qc
from qmpcommit.commit.hook import PivotCommand
from qmpcommit.commit.policy import Ready
from qmpcommit.commit.preconditions import check_commands, told
from qmpcommit.commit.stale_layers import why_unknown
from qmpcommit.qmp.address import is_socket
from tests.unit.test_checks import made


async def test_an_on_pivot_command_learns_the_commit(tmp_path: Path) -> None:
    image = qc.Image("base", "/i/base", "qcow2")
    outcome = qc.CommitOutcome("completed", "pivot", "vda", "j", image, image, image, vm="v")
    seen = tmp_path / "seen"
    said = f'echo "$QMPCOMMIT_VM $QMPCOMMIT_ACTIVE" > {seen}'
    await PivotCommand(["sh", "-c", said], 60)(outcome)
    await PivotCommand(["true"], 60)(replace(outcome, active=None))
    assert seen.read_text() == "v /i/base\n"
    with pytest.raises(qc.CommitFailed, match="false ended with status 1"):
        await PivotCommand(["false"], 60)(outcome)
    with pytest.raises(qc.CommitFailed, match="60 took too long"):
        await PivotCommand(["sleep", "60"], 0.01)(outcome)


def test_no_command_is_told_another_files_name(folder: Path) -> None:
    graph, plan = made()
    assert told(plan, graph, None) == plan
    (folder / "x").touch()
    astray = replace(plan.base, filename=str(folder / "x"), astray="it is another here")
    wrong = replace(plan, base=astray, policy=qc.Check(["true"]))
    for each, hook in ((wrong, None), (replace(wrong, policy=qc.Pivot()), PivotCommand(["x"], 1))):
        with pytest.raises(qc.ChainError, match=r"would be told.*another here.*Nothing was sent"):
            check_commands(each, hook)
    check_commands(replace(wrong, policy=qc.Pivot()), None)
    with pytest.raises(qc.ChainError, match="It was not run"):
        Ready("v", "vda", "j", wrong.base, wrong.top).environment()
    (folder / "x").unlink()
    check_commands(wrong, None)  # it finds nothing under that name


def test_a_slice_is_handed_out_as_what_it_is() -> None:
    shown = 'json:{"driver": "raw", "offset": 512, "file": {"driver": "file", "filename": "/i/x"}}'
    image = qc.Image("base", "/i/x", "raw", shown)
    assert Ready("v", "vda", "j", image, image).environment()["QMPCOMMIT_BASE"] == shown


def test_a_file_that_was_given_open_is_handed_out_by_its_name() -> None:
    image = qc.Image("base", "/dev/fdset/3", "qcow2", given_as="/i/base")
    assert Ready("v", "vda", "j", image, image).environment()["QMPCOMMIT_BASE"] == "/i/base"


def test_why_a_file_stays(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "link").symlink_to(folder / "file")
    known = {"none": "No such file", "link": "is a link to", ".": "no regular file"}
    for name, said in (known | {"file": "not seen to have this very"}).items():
        assert said in why_unknown(os.path.join(folder, name))


async def test_what_is_no_socket_is_told_so(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(qc.ConnectError, match="that is no socket"):
        await qc.Session.connect(folder / "file")
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(folder / "socket"))
    assert is_socket(str(folder / "socket"))
    assert not is_socket(str(folder / "none"))
    with pytest.raises(qc.ConnectError, match="the VM has ended"):
        await qc.Session.connect(folder / "socket")
