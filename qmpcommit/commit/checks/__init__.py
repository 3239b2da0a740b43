"""What can be known to go wrong, looked at before the first byte is written.

`check_commit` compares a plan with QEMU's block graph and with the files on this host and
tells what it found; `refuse` turns what speaks against the commit into one error. Each check
has a name, by which it can be overridden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from qmpcommit.block.graph import BlockGraph
from qmpcommit.block.identity import OpenFiles
from qmpcommit.commit.checks.filters import lost_filter
from qmpcommit.commit.checks.finding import Case, Finding, unchecked
from qmpcommit.commit.checks.header_above import header_above
from qmpcommit.commit.checks.layers import corrupt, encrypted, stale
from qmpcommit.commit.checks.on_disk import on_disk_backing
from qmpcommit.commit.checks.read_only import read_only_base
from qmpcommit.commit.checks.replaced import replaced_file
from qmpcommit.commit.checks.room import growth, sizes, space
from qmpcommit.commit.checks.runtime import runtime
from qmpcommit.commit.checks.sharing import base_shared
from qmpcommit.commit.checks.snapshots import internal_snapshots, temporary_overlay
from qmpcommit.commit.plan import Plan
from qmpcommit.errors import ChainError, InvalidRequest, NoSpace

__all__ = ["NAMES", "Finding", "check_commit", "check_override", "growth", "refuse"]

Check = Callable[[Case], Iterator[Finding]]

CHECKS: dict[str, Check] = {
    "free-space": space,
    "size": sizes,
    "base-shared": base_shared,
    "read-only-base": read_only_base,
    "corrupt": corrupt,
    "stale": stale,
    "encrypted": encrypted,
    "on-disk-backing": on_disk_backing,
    "replaced-file": replaced_file,
    "lost-filter": lost_filter,
    "header-above": header_above,
    "internal-snapshots": internal_snapshots,
    "temporary-overlay": temporary_overlay,
    "runtime": runtime,
}

NAMES = tuple(CHECKS)
"""The names of all checks, in the order in which they are told."""

CLAIM = "claim"
"""Overrides that somebody else holds the disk (`qmpcommit.commit.claim`)."""

READER = "reader"
"""Overrides that somebody still reads what stood still in a window (`qmpcommit.window.readers`)."""

OVERRIDES = (*NAMES, CLAIM, READER)
"""All that can be overridden: a check's refusal, that somebody else holds the disk, or reads it."""

_ABOUT_SPACE = frozenset(("free-space", "size"))


def check_commit(
    graph: BlockGraph,
    plan: Plan,
    *,
    pid: int | None = None,
    cwd: str | None = None,
    probe_locks: bool = True,
    opened: OpenFiles | None = None,
) -> list[Finding]:
    """All checks of a plan against the graph that it was made from; nothing is changed.

    `pid` is QEMU's (without it, nothing is looked at on this host), `cwd` its working
    directory, `opened` are its files where they were looked at just now. Whose the locks on a base
    are that QEMU does not write to yet costs the kernel some 20 ms to tell; without `probe_locks`
    it is left to QEMU, which refuses a base that another process has locked. Looks at files, so
    that it belongs in a thread. Findings come in the order of `NAMES`; a check may have several.
    """
    if not {plan.base.node_name, plan.top.node_name} <= graph.nodes.keys():
        return [Finding(name, "note", "not checked: the layers are not known") for name in NAMES]
    opened = OpenFiles.of(graph, pid, cwd=cwd) if opened is None else opened
    case = Case(graph, plan, pid, cwd, probe_locks, opened)
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        try:
            found = list(check(case))
        except OSError as error:
            found = [unchecked(name, f"{error.filename or 'a file'}: {error.strerror}")]
        findings += found or [Finding(name, "ok", "nothing speaks against it")]
    return findings


def check_override(names: Collection[str]) -> None:
    """Refuse a name of nothing that can be overridden; raises `InvalidRequest`."""
    unknown = sorted(set(names) - set(OVERRIDES))
    if unknown:
        raise InvalidRequest(
            f"there is no check {', '.join(map(repr, unknown))}; those that can be overridden are"
            f" {', '.join(OVERRIDES)}. Nothing was sent"
        )


def refuse(findings: Iterable[Finding], overridden: Collection[str] = ()) -> None:
    """Raise one error that names all failed checks which are not overridden, or can't be.

    `NoSpace` where only space is missing, else `ChainError`; `InvalidRequest` for a name in
    `overridden` that no check has.
    """
    check_override(overridden)
    against = (f for f in findings if f.level == "refuse")
    failed = [f for f in against if f.final or f.name not in overridden]
    if not failed:
        return
    kind = NoSpace if all(f.name in _ABOUT_SPACE for f in failed) else ChainError
    told = " ".join(f"[{f.name}] {f.message}." for f in failed)
    raise kind(
        f"{told} Nothing was sent",
        checks=list(dict.fromkeys(f.name for f in failed)),
        findings=[f.model_dump(mode="json") for f in failed],
    )
