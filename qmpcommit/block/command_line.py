"""What QEMU's command line says of its block nodes and monitors: options that no query tells.

Discard, aio and locking of a node are told nowhere by QEMU itself, only by how it was started
(``/proc/PID/cmdline``). A node that was added later is not there, unless it has taken the place
of one that was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from qmpcommit.qmp.process import command_words

Flat = Mapping[str, Any]
"""Options by their dotted names, as on a command line."""


_TALK = ("chardev", "mon", "monitor", "qmp", "qmp-pretty", "serial")
"""What monitors and other sockets are given with."""


class CommandLine(NamedTuple):
    """The ``-blockdev``, ``-drive`` and ``-device`` options, in their order.

    `monitors` are the Unix sockets on which its QMP monitors listen, `sockets` those that are for
    something else (a guest agent, a console), as they were given.
    """

    nodes: tuple[Flat, ...]
    drives: tuple[Flat, ...]
    devices: tuple[Flat, ...]
    monitors: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()

    def of_node(self, name: str) -> Flat | None:
        """What a node of this name was declared with, its children's options included."""
        for options in (*self.nodes, *self.drives):
            for key, value in options.items():
                if value == name and (key == "node-name" or key.endswith(".node-name")):
                    return _below(options, key.removesuffix("node-name"))
        return None

    def of_drive(self, alias: str, filename: str) -> Flat | None:
        """What a ``-drive`` of this id, or where it has none, of this file was given."""
        for options in self.drives:
            if options.get("id") == alias if "id" in options else options.get("file") == filename:
                return options
        return None

    def of_device(self, qdev: str) -> Flat | None:
        """What the node that a device was started with was declared with."""
        for device in self.devices:
            if qdev and device.get("id") == qdev and "drive" in device:
                drive = str(device["drive"])
                return self.of_node(drive) or self.of_drive(drive, "")
        return None


def read_command_line(pid: int | None) -> CommandLine | None:
    """That of a process; None where it can't be read."""
    words = command_words(pid)
    return None if words is None else parse_command_line([os.fsdecode(word) for word in words])


def parse_command_line(words: list[str]) -> CommandLine:
    """Pure, of the words of a command line."""
    found: dict[str, list[Flat]] = {kind: [] for kind in ("blockdev", "drive", "device", *_TALK)}
    for option, value in pairwise(words):
        kind = option.lstrip("-")
        if option.startswith("-") and kind in found:
            found[kind].append(_flat(value))
    monitors, sockets = _listening(found)
    nodes, drives, devices = (tuple(found[kind]) for kind in ("blockdev", "drive", "device"))
    return CommandLine(nodes, drives, devices, monitors, sockets)


def _listening(found: Mapping[str, list[Flat]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sockets of QMP monitors, and those of other things."""
    monitors = [name for kind in ("qmp", "qmp-pretty") for name in _unix(found[kind])]
    speak = {
        str(options.get("chardev") or next(iter(options), ""))
        for kind, usual in (("mon", "readline"), ("monitor", "control"))  # the storage daemon's
        for options in found[kind]
        if options.get("mode", usual) == "control"
    }
    sockets = [name for kind in ("monitor", "serial") for name in _unix(found[kind])]
    for options in found["chardev"]:
        if "socket" in options and options.get("path") and _serves(options):
            of = monitors if options.get("id") in speak else sockets
            of.append(str(options["path"]))
    return tuple(dict.fromkeys(monitors)), tuple(sockets)


def _unix(given: list[Flat]) -> Iterator[str]:
    for options in given:
        name = next(iter(options), "")
        if name.startswith("unix:") and _serves(options):
            yield name.removeprefix("unix:")


def _serves(options: Flat) -> bool:
    return str(options.get("server", "off")) in ("on", "yes", "")


def _flat(value: str) -> Flat:
    """An option's value, in either form."""
    if value.startswith("{"):
        try:
            return dict(_leaves(json.loads(value), ""))
        except ValueError:
            return {}
    options = {}
    for part in value.replace(",,", "\0").split(","):
        key, _, given = part.partition("=")
        options[key] = given.replace("\0", ",")
    return options


def _leaves(value: object, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _below(options: Flat, prefix: str) -> Flat:
    return {key.removeprefix(prefix): v for key, v in options.items() if key.startswith(prefix)}
