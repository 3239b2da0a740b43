"""What can be known of a configuration before anything runs: what is wrong, and what is noted."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import socket
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, suppress
from fnmatch import fnmatchcase
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from qmpcommit.daemon import roll, schema
from qmpcommit.daemon.config import Config
from qmpcommit.daemon.losses import told_of
from qmpcommit.daemon.registry import name_of
from qmpcommit.daemon.rights import group_id
from qmpcommit.daemon.salvage import Loss, Lost
from qmpcommit.qmp.address import SUN_PATH, Address, is_socket

_CHARACTERS = [chr(code) for code in range(33, 127)]


class Findings(NamedTuple):
    """`wrong` would fail when it is needed; `noted` is right, but perhaps not what is meant."""

    wrong: list[str]
    noted: list[str]


def examine(config: Config) -> Findings:
    """Look at the files, folders and programs that a configuration names; changes nothing."""
    wrong = [
        *_state(config), *_journal(config), *_sockets(config), *_tcp(config), *_allowed(config),
        *_cycles(config),
    ]  # fmt: skip
    noted = [
        *_open_state(config), *_overlaps(config), *_twice(config), *_nothing_there(config),
        *_losses(config),
    ]  # fmt: skip
    return Findings(wrong, noted)


# -- what is wrong --------------------------------------------------------------------------------


def _state(config: Config) -> Iterator[str]:
    there = Path(config.state).absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        yield f"state: {there} is no folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"state: this user may not write to {there}"


def _journal(config: Config) -> Iterator[str]:
    path = Path(config.state, "journal.db")
    if os.path.lexists(path) and not path.is_file():
        yield f"state: {path} is no file"
        return
    for each in (path, Path(config.state, "lock"), roll.path_of(path)):
        if each.exists() and not os.access(each, os.R_OK | os.W_OK):
            yield f"state: this user may not read and write {each}"
            return
    for version in _read(path, "SELECT user_version FROM pragma_user_version, whole"):
        if version[0] > len(schema.VERSIONS):
            yield (
                f"state: {path} was written by a newer qmpcommitd (schema {version[0]}, this one"
                f" knows {len(schema.VERSIONS)})"
            )


def _tcp(config: Config) -> Iterator[str]:
    if config.listen.tcp is None:
        return
    host, _, port = config.listen.tcp.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host.strip("[]"), int(port)))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:  # perhaps by the daemon that has this configuration
            yield f"listen.tcp: can't listen on {config.listen.tcp}: {error.strerror}"


def _allowed(config: Config) -> Iterator[str]:
    for kind in ("monitors", "agents", "overlays", "deletions"):
        for folder in getattr(config.access, kind, None) or ():
            fixed = _fixed(folder)
            if not os.path.isdir(fixed):
                what = "no folder" if os.path.lexists(fixed) else "not there"
                yield f"access.{kind}: {fixed} is {what}: nothing could be in {folder}"


def _fixed(pattern: str) -> str:
    """The beginning of a path that is no pattern."""
    parts = Path(pattern).parts
    last = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return str(Path(*parts[:last]))


def _sockets(config: Config) -> Iterator[str]:
    path = config.listen.socket
    folder = os.path.dirname(os.path.abspath(path))
    if len(os.fsencode(path)) > SUN_PATH:
        yield f"listen.socket: a socket's path has at most {SUN_PATH} bytes"
    elif os.path.lexists(path) and not is_socket(path):
        yield f"listen.socket: {path} is there already, and is no socket"
    elif os.path.lexists(folder) and not os.path.isdir(folder):
        yield f"listen.socket: {folder} is no folder"
    elif os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
        yield f"listen.socket: this user may not write to {folder}"
    elif "socket" in config.listen.model_fields_set and not os.path.isdir(folder):
        yield f"listen.socket: there is no folder {folder}"
    if config.listen.group is not None and os.geteuid():
        group = group_id(config.listen.group)
        if group not in (os.getegid(), *os.getgroups()):
            yield (
                f"listen.group: this user may not give the socket to the group"
                f" {config.listen.group}, for it is not in it"
            )
    for number, vm in enumerate(config.vm):
        monitor = Address.parse(vm.qmp).path
        if monitor is not None and _is_another_file(monitor):
            yield f"vm.{number}.qmp: {monitor} is no socket: give that of QEMU's -qmp option"
    for number, cycle in enumerate(config.cycle):
        for name, path in cycle.sockets(vm for vm, _ in cycle.disks).items():
            if _is_another_file(path):
                yield f"cycle.{number}: {path} is no socket of {name}'s guest agent"


def _is_another_file(path: str) -> bool:
    with suppress(OSError):
        return not stat.S_ISSOCK(os.stat(path).st_mode)
    return False


def _cycles(config: Config) -> Iterator[str]:
    for number, cycle in enumerate(config.cycle):
        if shutil.which(cycle.keep_if[0]) is None:
            yield f"cycle.{number}.keep_if: there is no command '{cycle.keep_if[0]}'"
        if cycle.overlay_dir is not None and not os.path.isdir(cycle.overlay_dir):
            yield f"cycle.{number}.overlay_dir: there is no folder {cycle.overlay_dir}"


# -- what is noted --------------------------------------------------------------------------------


def open_to_others(state: Path) -> str | None:
    """What is told of a state folder that others may look into, and that is not ours to close.

    Empty where they may not, None where it is ours: it holds a journal, or nothing.
    """
    found = state.stat()
    if not stat.S_IMODE(found.st_mode) & 0o077:
        return ""
    held = os.listdir(state)
    if found.st_uid == os.geteuid() and (not held or "journal.db" in held):
        return None
    return (
        f"{state} may be looked into by others (mode {stat.S_IMODE(found.st_mode):04o}), and holds"
        " more than a journal or is another user's: give the daemon a folder of its own, mode 0700"
    )


def _open_state(config: Config) -> Iterator[str]:
    with suppress(OSError):
        if told := open_to_others(Path(config.state)):
            yield f"state: {told}"


def _overlaps(config: Config) -> Iterator[str]:
    for number, rule in enumerate(config.flatten):
        for vm, disk in (place for cycle in config.cycle for place in cycle.disks):
            if fnmatchcase(vm, rule.vm) and meet(rule.disk, disk):
                yield (
                    f"flatten.{number} ({rule.vm} {rule.disk}) meets the cycle of {disk} of {vm}:"
                    " the rule leaves that disk alone"
                )
    for (one, rule), (other, second) in combinations(enumerate(config.flatten), 2):
        if meet(rule.vm, second.vm) and meet(rule.disk, second.disk):
            yield (
                f"flatten.{one} ({rule.vm} {rule.disk}) meets flatten.{other} ({second.vm}"
                f" {second.disk}): disks of both are brought down by either's limit"
            )


def _twice(config: Config) -> Iterator[str]:
    for one, other in combinations(config.vm, 2):
        if one.qmp == other.qmp:
            yield f"{one.name} and {other.name} have one monitor, which serves one at a time"
    for number, rule in enumerate(config.discover):
        for vm in config.vm:
            found = name_of(rule.glob, vm.qmp)
            if vm.qmp in glob.glob(rule.glob) and found != vm.name:
                yield f"discover.{number} finds the monitor of {vm.name} too, and calls it {found}"


def _nothing_there(config: Config) -> Iterator[str]:
    for number, rule in enumerate(config.discover):
        folder = _fixed(os.path.dirname(rule.glob))
        if not os.path.isdir(folder):
            yield f"discover.{number}: there is no folder {folder} yet, in which VMs are looked for"


def _read(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a journal that is only looked at; none where it can't be read."""
    if path.is_file():
        with (
            suppress(sqlite3.Error),  # in use by another version, or damaged: the daemon says it
            closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as journal,
        ):
            return journal.execute(sql).fetchall()
    return []


def _losses(config: Config) -> Iterator[str]:
    sql = "SELECT why, kept, promises, all_named FROM losses ORDER BY id"
    for why, kept, promises, all_named in _read(Path(config.state, "journal.db"), sql):
        lost = tuple(Lost(**each) for each in json.loads(promises))
        told = told_of(Loss(why, kept, lost, bool(all_named)))
        names = ", ".join(f"{each.kind} {each.id} of {each.disk} of {each.vm}" for each in lost)
        yield told + (f" ({names})" if names else "")


def meet(one: str, other: str) -> bool:
    """Whether a name can match both patterns (``*``, ``?``, ``[...]``)."""
    first, second = _parts(one), _parts(other)
    ends = {(0, 0)}
    waiting = [(0, 0)]
    while waiting:
        at, there = waiting.pop()
        if (at, there) == (len(first), len(second)):
            return True
        for following in _after(first, second, at, there):
            if following not in ends:
                ends.add(following)
                waiting.append(following)
    return False


def _after(first: list[str], second: list[str], at: int, there: int) -> Iterator[tuple[int, int]]:
    a = first[at] if at < len(first) else None
    b = second[there] if there < len(second) else None
    if a == "*":
        yield at + 1, there
    if b == "*":
        yield at, there + 1
    if a is None or b is None:
        return
    if a == "*" or b == "*":
        yield (at if a == "*" else at + 1), (there if b == "*" else there + 1)
    elif a == b or any(fnmatchcase(c, a) and fnmatchcase(c, b) for c in _CHARACTERS):
        yield at + 1, there + 1


def _parts(pattern: str) -> list[str]:
    """Its parts, each for one character, but ``*``."""
    found, at = [], 0
    while at < len(pattern):
        end = pattern.find("]", at + 2) if pattern[at] == "[" else -1
        part = pattern[at : end + 1] if end > 0 else pattern[at]
        found.append("[[]" if part == "[" else part)
        at += len(part)
    return found
