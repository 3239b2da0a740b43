from __future__ import annotations

import asyncio
import json
import os
import sys
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

import qmpcommit as qc
from qmpcommit.block.chain import Image
from qmpcommit.commit import policy as policy_module
from qmpcommit.commit.policy import (
    AnyPolicy,
    ends_of,
    fresh_of,
    immediate,
    parse_policy,
    run_command,
    settle,
)
from qmpcommit.errors import CommitFailed, InvalidRequest, PolicyRequired

READY = qc.Ready(
    vm="web1",
    disk="vda",
    job_id="qmpcommit-vda-1",
    base=Image("base", "/images/base.qcow2", "qcow2"),
    top=Image("top", "/images/top.qcow2", "qcow2"),
)
FRESH = qc.Recycle("/fresh", {"cluster_size": 65536}, "key")
POLICIES = [
    qc.Pivot(),
    qc.Keep(),
    qc.Abort(),
    qc.Hold(),
    qc.Hold(timeout=3, otherwise=qc.Abort()),
    qc.Check(command=["test", "-f", "x"], timeout=5, passed=qc.Keep(), failed=qc.Abort()),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_policies_travel_through_json_unchanged(policy: Any) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(qc.Policy)
    text = policy.model_dump_json()
    assert adapter.validate_json(text) == policy
    assert adapter.validate_json(adapter.dump_json(policy)) == policy
    assert parse_policy(text) == policy
    assert parse_policy(json.loads(text)) == policy
    assert type(policy).model_validate_json(text) == policy


def test_policies_are_fields_of_pydantic_models() -> None:
    class Order(BaseModel):
        policy: qc.Policy

    order = Order(policy=qc.Hold(timeout=1))
    assert Order.model_validate_json(order.model_dump_json()) == order
    with pytest.raises(ValidationError):
        Order.model_validate({"policy": {"kind": "pivot", "more": 1}})
    assert "discriminator" in json.dumps(Order.model_json_schema())


def test_policies_are_frozen() -> None:
    with pytest.raises(AttributeError):
        qc.Hold().timeout = 1  # type: ignore[misc]


def test_a_missing_policy_says_what_to_give() -> None:
    with pytest.raises(PolicyRequired, match=r"a pivot .*a keep"):
        parse_policy(None)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "{",
        "[]",
        "null",
        '"pivot"',
        "{}",
        '{"kind": "pivto"}',
        '{"kind": ["pivot"]}',
        '{"kind": "pivot", "timeout": 1}',
        '{"kind": "hold", "timeout": -1}',
        '{"kind": "hold", "timeout": "soon"}',
        '{"kind": "hold", "otherwise": {"kind": "hold"}}',
        '{"kind": "check"}',
        '{"kind": "check", "command": []}',
        '{"kind": "check", "command": "true"}',
        '{"kind": "check", "command": ["a\\u0000b"]}',
        '{"kind": "check", "command": ["true"], "timeout": 1e999}',
        1,
        object(),
        qc.Pivot,
        {"kind": "keep", 1: 2},
        "[" * 100_000,
    ],
    ids=count(),  # a runner of single tests must be able to name each
)
def test_what_is_no_policy(value: object) -> None:
    with pytest.raises(InvalidRequest):
        parse_policy(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["kind", "timeout", "otherwise", "command", "passed", "x"]), inner
            )
        ),
    ),
    st.sampled_from(["pivot", "keep", "abort", "hold", "check", "recycle", ""]),
)
def test_any_json_is_a_policy_or_a_clear_error(value: Any, kind: str) -> None:
    if isinstance(value, dict):
        value["kind"] = kind
    try:
        parse_policy(json.dumps(value))
    except (InvalidRequest, PolicyRequired) as error:
        assert error.message


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "soon"])
def test_a_hold_of_no_time_is_refused(timeout: Any) -> None:
    with pytest.raises(InvalidRequest):
        qc.Hold(timeout=timeout)


@pytest.mark.parametrize("command", ["true", (), ("a\0",), (1,), None, b"true"])
def test_a_check_of_no_command_is_refused(command: Any) -> None:
    with pytest.raises(InvalidRequest):
        qc.Check(command=command)


@pytest.mark.parametrize("later", [qc.Hold(), qc.Check(["true"]), "keep", {"kind": "keep"}, None])
def test_what_is_done_in_the_end_is_no_policy_that_decides_later(later: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^Hold's otherwise is what is done in the end"):
        qc.Hold(otherwise=later)
    with pytest.raises(InvalidRequest, match=r"^Check's passed is"):
        qc.Check(["true"], passed=later)
    with pytest.raises(InvalidRequest, match=r"^Check's failed is"):
        qc.Check(["true"], failed=later)


async def test_a_check_decides_by_exit_status() -> None:
    check = qc.Check(command=["true"], passed=qc.Abort(), failed=qc.Keep())
    assert (await settle(check, READY)).decision == qc.Abort()
    check = qc.Check(command=["false"], passed=qc.Abort(), failed=qc.Keep())
    assert (await settle(check, READY)).decision == qc.Keep()


async def test_a_check_learns_what_it_is_about(tmp_path: Path) -> None:
    out = tmp_path / "env"
    check = qc.Check(command=["sh", "-c", f"env > {out}"])
    assert (await settle(check, READY)).by == "check passed"
    lines = set(out.read_text().splitlines())
    assert {
        "QMPCOMMIT_VM=web1",
        "QMPCOMMIT_DISK=vda",
        "QMPCOMMIT_JOB=qmpcommit-vda-1",
        "QMPCOMMIT_BASE=/images/base.qcow2",
        "QMPCOMMIT_TOP=/images/top.qcow2",
        "QMPCOMMIT_BASE_NODE=base",
        "QMPCOMMIT_TOP_NODE=top",
        f"PATH={os.environ['PATH']}",
    } <= lines


async def test_a_check_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! $$ > {pids}; wait"
    for seconds in (0.3, 3.0, 30.0):  # in which a busy machine may not even have begun it
        check = qc.Check(command=["sh", "-c", script], timeout=seconds)
        assert (await settle(check, READY)).by == "check failed"
        if pids.exists() and pids.read_text():
            break
    for pid in pids.read_text().split():
        assert await _ends(int(pid))


async def test_a_cancelled_check_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    task = asyncio.create_task(
        run_command(["sh", "-c", f"echo $$ > {pids}; exec sleep 60"], {}, 60)
    )
    async with asyncio.timeout(10):
        while not pids.exists() or not pids.read_text().strip():
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _ends(int(pids.read_text()))


async def _ends(pid: int) -> bool:
    """Whether a process is gone (or a zombie of somebody else) within seconds."""
    async with asyncio.timeout(5):
        while True:
            try:
                with open(f"/proc/{pid}/stat") as stat:
                    if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                        return True
            except FileNotFoundError:
                return True
            await asyncio.sleep(0.01)


async def test_what_a_check_prints_is_not_our_output(capfd: pytest.CaptureFixture[str]) -> None:
    assert await run_command([sys.executable, "-c", "print('noise')"], {}, 30) == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == "noise\n"


async def test_a_callable_answers_with_a_policy() -> None:
    async def decide(ready: qc.Ready) -> qc.Hold:
        assert ready is READY
        return qc.Hold(timeout=0, otherwise=qc.Pivot())

    assert (await settle(decide, READY)).decision == qc.Pivot()


async def test_a_callable_that_answers_nonsense_is_an_error() -> None:
    answers: dict[str, Any] = {"'pivot'; it must": "pivot", "True; it": True, "class Keep": qc.Keep}
    for said, answer in answers.items():
        with pytest.raises(InvalidRequest, match=f"answered .*{said}") as error:
            await settle(AsyncMock(return_value=answer), READY)
        assert (error.value.vm, error.value.disk) == (READY.vm, READY.disk)


@pytest.mark.parametrize("policy", POLICIES[:3], ids=repr)
async def test_a_decision_is_a_policy_that_needs_no_time(policy: Any) -> None:
    assert immediate(policy) == (policy, "policy")
    assert await settle(policy, READY) == (policy, "policy")


def test_what_needs_time_is_not_immediate() -> None:
    async def decide(ready: qc.Ready) -> qc.Pivot:
        return qc.Pivot()

    for policy in (qc.Hold(), qc.Check(command=["true"]), decide):
        assert immediate(policy) is None


async def test_a_hold_says_that_it_expired() -> None:
    hold = qc.Hold(timeout=0.01, otherwise=qc.Abort())
    assert await settle(hold, READY) == (qc.Abort(), "hold expired")


async def test_a_hold_lasts_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    for timeout in (0, 0.5, 3):
        await settle(qc.Hold(timeout=timeout), READY)
    assert slept == [0, 0.5, 3]


@pytest.mark.parametrize(("code", "by"), [(0, "check passed"), (1, "check failed")])
async def test_who_decided_is_said_of_a_check(code: int, by: str) -> None:
    check = qc.Check(command=["sh", "-c", f"exit {code}"])
    assert await settle(check, READY) == (qc.Keep() if code else qc.Pivot(), by)


@pytest.mark.parametrize(
    ("script", "said"),
    [("exit 126", "126.*could"), ("no-such-command", "127.*found"), ("kill -9 $$", "-9.*signal"),
     ("exit 137", "137.*signal")],
)  # fmt: skip
async def test_a_check_that_could_not_be_made_decides_nothing(script: str, said: str) -> None:
    with pytest.raises(CommitFailed, match=f"status {said}"):
        await settle(qc.Check(command=["sh", "-c", script]), READY)


async def test_a_callable_may_answer_with_a_check_that_learns_what_it_is_about() -> None:
    async def decide(ready: qc.Ready) -> qc.Check:
        return qc.Check(command=["sh", "-c", 'test "$QMPCOMMIT_DISK" = vda'])

    assert (await settle(decide, READY)).by == "check passed"


async def test_an_answer_that_is_no_policy_tells_the_job() -> None:
    async def decide(ready: qc.Ready) -> None:
        return None

    with pytest.raises(InvalidRequest, match=r"None; it must answer Pivot\(\)") as error:
        await settle(decide, READY)  # type: ignore[arg-type]
    assert error.value.job_id == READY.job_id


async def test_a_command_has_nothing_to_read() -> None:
    """It must not take the keys of whoever sits at the terminal."""
    script = 'test "$(readlink /proc/$$/fd/0)" = /dev/null'
    keys, ours = os.pipe()[0], os.dup(0)
    try:
        os.dup2(keys, 0)
        assert await run_command(["sh", "-c", script], {}, 30) == 0
    finally:
        os.dup2(ours, 0)
        os.close(ours)
        os.close(keys)


@pytest.mark.parametrize("overlay", ["/i/new.qcow2", Path("/i/new.qcow2")])
def test_a_recycle_takes_any_path(overlay: Any) -> None:
    policy = qc.Recycle(overlay)
    assert policy.overlay == "/i/new.qcow2"
    assert isinstance(policy.overlay, str)


@pytest.mark.parametrize(
    ("overlay", "words"),
    [("", "not ''"), (None, "not None"), (3, "not 3"), ("a\0b", "NUL byte"), ("\0", "NUL byte")],
)
def test_a_recycle_without_a_file_name_is_refused(overlay: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        qc.Recycle(overlay)


def test_a_callable_is_taken_as_it_is() -> None:
    async def decide(ready: qc.Ready) -> qc.Pivot:
        return qc.Pivot()

    assert parse_policy(decide) is decide


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "pivto"}, "kind is one of pivot, keep, abort, recycle, hold, check, not 'pivto'"),
        ({}, "not None"),
        ({"kind": "pivot", "more": 1}, "the policy pivot is wrong at more: "),
        (
            {"kind": "hold", "otherwise": {"kind": "keep", "more": 1}},
            r"the policy hold is wrong at otherwise\.Keep\.more: ",
        ),
        (
            {"kind": "hold", "otherwise": {"kind": "hold"}},
            r"hold is wrong at otherwise: its kind is one of pivot, keep, abort, recycle",
        ),
        ({"kind": "hold", "timeout": -1}, "^the policy hold is wrong: a hold's timeout"),
        ({"kind": "hold", "timeout": []}, "^the policy hold is wrong at timeout: "),
        ("pivot", r"the policy is no JSON \(Expecting value.*\); write for example"),
        (qc.Pivot, r"give a policy, Pivot\(\), not its class Pivot$"),
        ({"kind": "check", "command": "true"}, "the policy check is wrong at command: "),
        ({"kind": "check", "command": []}, "wrong: Check needs a command: a list of at least one"),
        (3, r"3 is no policy; give Pivot\(\)"),
    ],
)
def test_what_is_no_policy_is_told_with_what_is_wrong_in_it(given: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_policy(given)


def test_a_command_that_can_t_be_run_is_told_with_whose_it_is() -> None:
    with pytest.raises(InvalidRequest, match=r"^Check takes a command as a list .* not 'true'$"):
        qc.Check(command="true")
    with pytest.raises(InvalidRequest, match=r"^Check needs a command: a list"):
        qc.Check(command=[])


def test_a_wrong_timeout_says_whose_it_is() -> None:
    with pytest.raises(InvalidRequest, match="hold's timeout"):
        qc.Hold(timeout=-1)
    with pytest.raises(InvalidRequest, match="check's timeout"):
        qc.Check(command=["true"], timeout=-1)


def test_the_union_of_policies_is_found_in_its_module_and_nothing_else_is() -> None:
    """Its JSON schema tells the kinds by a discriminator."""
    schema = TypeAdapter(policy_module.Policy).json_schema()
    assert schema["discriminator"]["propertyName"] == "kind"
    assert set(schema["discriminator"]["mapping"]) == set(policy_module.KINDS)
    with pytest.raises(AttributeError, match=r"^nothing$"):
        policy_module.nothing  # noqa: B018


async def test_a_policy_that_needs_no_waiting_may_be_a_plain_function() -> None:
    def decide(ready: qc.Ready) -> Any:
        return qc.Abort() if ready.disk == "vda" else qc.Pivot()

    assert (await settle(decide, READY)).decision == qc.Abort()


@pytest.mark.parametrize(
    ("policy", "leaves", "held", "runs", "ends", "fresh"),
    [
        (qc.Pivot(), "base", False, False, [qc.Pivot()], []),
        (qc.Keep(), "overlay", False, False, [qc.Keep()], []),
        (qc.Abort(), "overlay", False, False, [qc.Abort()], []),
        (FRESH, "fresh", False, False, [FRESH], [FRESH]),
        (qc.Hold(timeout=9, otherwise=FRESH), None, True, False, [FRESH], [FRESH]),
        (qc.Check(["true"], passed=FRESH), None, False, True, [FRESH, qc.Keep()], [FRESH]),
    ],
)
def test_what_matters_of_a_policy_is_said_by_it(
    policy: AnyPolicy, leaves: str | None, held: bool, runs: bool, ends: list[Any], fresh: list[Any]
) -> None:
    assert (policy.leaves, policy.held, policy.runs) == (leaves, held, runs)
    assert ([*ends_of(policy)], fresh_of(policy)) == (ends, fresh)
    assert policy.rest(2) == (qc.Hold(timeout=7, otherwise=FRESH) if held else policy)
    assert parse_policy(policy.model_dump(mode="json")) == policy
    assert {"leaves", "held", "runs"}.isdisjoint(policy.model_dump())


def test_nothing_is_known_of_a_policy_of_ones_own() -> None:
    assert (ends_of(print), fresh_of(print), ends_of(None)) == ((), [], ())
