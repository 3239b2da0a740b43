"""What a caller can ask for of a commit: every value that there is, in one place.

`Request` has them all. Whoever asks gives them by name: `DiskOptions`, `GroupOptions` and
`CommitOptions` type the doors that take them (`Session.commit`, `GroupCommit`, `RemoteVM.commit`,
...), the API's body has the same fields, and the command an option for each. What lives in one
process, as callables and ledgers do, stands beside them at each door.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar

from qmpcommit.block.chain import Layer, layer_name
from qmpcommit.commit.policy import AnyPolicy, AskedPolicy, check_command, parse_policy
from qmpcommit.errors import InvalidRequest
from qmpcommit.units import parse_seconds, parse_size
from qmpcommit.values import Record, record

Stale: TypeAlias = Literal["leave", "rename", "delete"]
OnError: TypeAlias = Literal["report", "stop", "ignore", "enospc"]

_JOB_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class DiskOptions(TypedDict, total=False):
    """What is asked of each disk, of one alone and of several at one instant."""

    base: Layer | None
    shallow: bool
    bandwidth: int | str | None
    delete: bool
    stale: Stale | None
    on_error: OnError | None
    carry_bitmaps: bool
    override: Collection[str]


class GroupOptions(DiskOptions, total=False):
    """What is asked of a group: that of each disk, and what is asked once for all of them."""

    only_if: Sequence[str] | None
    timeout: float | None


class CommitOptions(GroupOptions, total=False):
    """What is asked of the commit of one disk."""

    policy: AskedPolicy | None
    top: Layer | None
    keep_relative: bool
    filter_node_name: str | None
    backing_mask_protocol: bool
    job_id: str | None


@record
class Request(Record):
    """All that is asked of one commit; `plan_commit` checks it against the disk.

    `delete` is short for a `stale` of "delete", and that of "leave" for none.
    """

    disk: str
    policy: Any = None
    base: Layer | None = None
    top: Layer | None = None
    shallow: bool = False
    bandwidth: int | str | None = None
    delete: bool = False
    stale: Stale | None = None
    on_error: OnError | None = None
    carry_bitmaps: bool = True
    keep_relative: bool = False
    filter_node_name: str | None = None
    backing_mask_protocol: bool = False
    override: Collection[str] = ()
    only_if: Sequence[str] | None = None
    timeout: float | None = None
    job_id: str | None = None

    def __post_init__(self) -> None:
        put = self.__dict__
        put["disk"], put["override"] = str(self.disk), tuple(self.override)
        if self.timeout is not None:
            put["timeout"] = parse_seconds(self.timeout, "timeout")
        if self.only_if is not None:
            put["only_if"] = check_command(self.only_if, "only_if")
        what_of_stale(self.delete, self.stale)
        if self.on_error not in (None, "report", "stop", "ignore", "enospc"):
            raise InvalidRequest(
                f"on_error is 'report', 'stop', 'ignore' or 'enospc', not {self.on_error!r}"
            )
        if self.policy is not None:
            put["policy"] = parse_policy(self.policy)

    @property
    def leaves(self) -> Stale:
        """What becomes of the files that a pivot or a merge makes stale."""
        return what_of_stale(self.delete, self.stale)

    def body(self) -> dict[str, Any]:
        """What of it is not as it is by default, as it travels; raises `InvalidRequest`."""
        made: dict[str, Callable[[Any], Any]] = {
            "policy": policy_body,
            "base": layer_name,
            "top": layer_name,
            "bandwidth": lambda rate: parse_size(rate, "bandwidth"),
            "filter_node_name": os.fspath,
            "override": list,
            "only_if": list,
            "job_id": check_job_id,
        }
        asked = {**vars(self), "delete": False}
        if self.leaves != "leave" or self.stale is not None:
            asked["stale"] = self.leaves
        given = ((f.name, asked[f.name]) for f in fields(self) if asked[f.name] != f.default)
        return {name: made[name](value) if name in made else value for name, value in given}


F = TypeVar("F", bound=Callable[..., Any])


def spelled_out(function: F) -> F:
    """Have its signature name each of its ``**options: Unpack[...]``, with what goes by default.

    For ``help`` and `inspect.signature`, which show a caller nothing else than ``**options``.
    """
    signature = inspect.signature(function)
    *plain, options = signature.parameters.values()
    named = function.__globals__[str(options.annotation).removeprefix("Unpack[").removesuffix("]")]
    defaults = {each.name: each.default for each in fields(Request)}
    told = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=defaults.get(name),
            annotation=getattr(annotation, "__forward_arg__", annotation),
        )
        for name, annotation in named.__annotations__.items()
    ]
    function.__signature__ = signature.replace(parameters=[*plain, *told])  # type: ignore[attr-defined]
    return function


def what_of_stale(delete: bool, stale: Stale | None) -> Stale:
    """What becomes of stale files; raises `InvalidRequest` where two things are asked for."""
    if delete and stale not in (None, "delete"):
        raise InvalidRequest(f"delete and stale={stale!r} exclude each other")
    if stale not in (None, "leave", "rename", "delete"):
        raise InvalidRequest(f"stale is 'leave', 'rename' or 'delete', not {stale!r}")
    return stale or ("delete" if delete else "leave")


def policy_body(policy: object) -> dict[str, Any]:
    """A policy as it travels; raises `InvalidRequest`."""
    policy = parse_policy(policy)
    if not isinstance(policy, AnyPolicy):
        raise InvalidRequest(
            "a policy of your own lives in this process and can't survive it: give a policy"
            " that is a value, or Hold() and decide when the job is ready"
        )
    return policy.model_dump(mode="json")


def check_job_id(job_id: str) -> str:
    """A caller's job id, as QEMU takes them: a letter, then letters, digits and ``-._``."""
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id) or len(job_id) > 255:
        raise InvalidRequest(
            f"'{job_id}' is no job id: a letter, then letters, digits, '-', '.' and '_'"
        )
    return job_id
