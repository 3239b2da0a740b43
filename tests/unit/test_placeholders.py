"""What a window's COMMAND is handed: never a part of its program."""

from __future__ import annotations

import pytest

import qmpcommit as qc
from qmpcommit.cli.options import Options
from qmpcommit.cli.placeholders import check_known, filled, used, variables
from qmpcommit.cli.running import Run
from qmpcommit.cli.window import _closed, _names

PLAIN, SHARP = "/vms/web1/vda.qcow2", "/vms/my disk; touch stray"


@pytest.mark.parametrize(
    "command",
    [
        ["sh", "-c", "cp {vda} /b"],
        ["sh", "-c", "cp '{vda}' /b"],
        ["sh", "-c", "{vda}"],
        ["bash", "-ec", "{vda}"],
        ["sudo", "env", "A=b", "/bin/sh", "-c", "cp {vda} /b"],
        ["python3", "-c", "open('{vda}')"],
        ["ssh", "host", "cat", "{vda}"],
        ["su", "root", "-c", "{vda}"],
        ["xargs", "sh", "-c", "{vda}"],
        ["env", "-S", "{vda}"],
        ["perl", "-e{vda}"],
        ["{vda}"],
        ["awk", "{vda}"],
    ],
)
def test_a_name_that_could_be_run_is_put_into_no_program(command: list[str]) -> None:
    with pytest.raises(qc.InvalidRequest, match=r"QMPCOMMIT_FILE_vda.*was not run"):
        filled(command, {"vda": SHARP})
    assert filled(command, {"vda": PLAIN}) == [word.replace("{vda}", PLAIN) for word in command]


@pytest.mark.parametrize(
    "command",
    [
        ["cp", "{vda}", "/b"],
        ["dd", "if={vda}", "of=/b"],
        ["qemu-img", "convert", "--image-opts={vda}", "-c", "{vda}"],
        ["gzip", "-c", "{vda}"],
        ["sh", "-c", 'cp "$1" /b', "sh", "{vda}"],
        ["sh", "script", "{vda}"],
        ["echo", "{vdb}", "{vda}{vda}"],
    ],
)
def test_a_name_is_handed_over_as_an_argument(command: list[str]) -> None:
    for name in (PLAIN, SHARP, "/vms/{vda}"):
        assert filled(command, {"vda": name}) == [word.replace("{vda}", name) for word in command]


def test_a_name_that_looks_like_another_placeholder_is_only_a_name() -> None:
    files = {"vda": "/{vdb}", "vdb": "/x"}
    assert filled(["cp", "{vda}", "{vdb}"], files) == ["cp", "/{vdb}", "/x"]
    assert used(["cp", "{vda}", "{vdc}"], list(files)) == {"vda"}


def test_variables() -> None:
    files = {"1.vda": "/a b", "2.vda": "/c", "vd-a": "/d", "vd.a": "/e"}
    assert variables(files) == {
        "QMPCOMMIT_FILE_1_vda": "/a b",
        "QMPCOMMIT_FILE_2_vda": "/c",
        "QMPCOMMIT_FILES": "/a b\n/c\n/d\n/e",
    }


@pytest.mark.parametrize("word", ["{vdb}", "/b/{vdb}.qcow2", "{1.vda}", "{sda}"])
def test_a_disk_that_is_not_in_the_window_is_refused(word: str) -> None:
    with pytest.raises(qc.InvalidRequest, match=r"no disk of this window \(vda\)"):
        check_known(["ls", word], ["vda"])
    check_known(["ls", "{vda}", "${vdb}", "{print}", "{1..3}", "{}", "{a,b}"], ["vda"])


def test_over_several_vms_a_name_that_two_have_is_refused() -> None:
    names = _names({"one": ["vda", "vdb"], "two": ["vda"]})
    check_known(["{1.vda}", "{2.vda}", "{vdb}", "{1.vdb}"], names)
    for word in ("{vda}", "{2.vdb}", "{3.vda}"):
        with pytest.raises(qc.InvalidRequest):
            check_known([word], names)


async def test_a_command_that_was_ended_for_its_time_is_told_so() -> None:
    running = Run(Options.of(False, False, 0, "3"))
    running.timed_out = True
    answer = _closed(running, {}, {"vda": PLAIN}, 143, [])
    assert answer.text.endswith("status 143; it was told to end, for the time was up (3 s)")
