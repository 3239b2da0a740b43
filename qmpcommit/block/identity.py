"""Which file is meant: the file that QEMU has open, against the one that a name leads to.

QEMU tells the names by which it opened its files. A name may lead to another file by now (it was
replaced by a rename), to none (it was removed), or to another one from here (QEMU has its own
file systems). What tells is QEMU's process: its open files, its root and its working directory.
Where they can't be looked at, nothing is claimed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Literal, NamedTuple

from qmpcommit.block.chain import Disk, Image
from qmpcommit.block.graph import FDSET, BlockGraph, Node

HOST_FILES = frozenset(("file", "host_device", "host_cdrom"))
"""The protocol drivers whose files are of the host that QEMU runs on."""

F_OFD_GETLK = getattr(fcntl, "F_OFD_GETLK", 36)
_FLOCK = "hhqqi4x"

LOCK_BYTES = (*range(100, 105), *range(200, 205))
"""QEMU locks byte 100 + n for a permission it has, 200 + n for one it lets nobody else have.

The permissions are read, write, write unchanged, resize (and, before 6.2, graph changes). All
are shared OFD locks, so several holders of one byte are usual.
"""


class FileId(NamedTuple):
    """A file, whatever its names."""

    device: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileId:
        """That of a file or, for a device node, of the device."""
        if stat.S_ISBLK(found.st_mode):
            return cls(-1, found.st_rdev)
        return cls(found.st_dev, found.st_ino)


def file_id(path: str) -> FileId | None:
    """What the path names, links followed; None where nothing."""
    try:
        return FileId.of(os.stat(path))
    except OSError:
        return None


def open_files(pid: int) -> dict[int, FileId]:
    """The open files of a process by descriptor; empty where we may not look."""
    found: dict[int, FileId] = {}
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):
                found[int(number)] = FileId.of(os.stat(f"/proc/{pid}/fd/{number}"))
    except OSError:
        return {}
    return found


def writes(pid: int, file: FileId) -> bool:
    """Whether a process is seen to have this very file open for writing."""
    for number, opened in open_files(pid).items():
        if opened == file:
            with suppress(OSError, ValueError, LookupError):
                with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as info:
                    told = info.read()
                flags = int(told.split("flags:")[1].split()[0], 8)
                if flags & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False


def is_locked(path: str) -> bool:
    """Whether anybody, QEMU itself included, holds one of QEMU's image locks on the file.

    Raises OSError where it can't be opened from here.
    """
    kind = os.stat(path).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        return False
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        for start in (LOCK_BYTES[0], LOCK_BYTES[5]):
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, 5, 0)
            answer = struct.unpack(_FLOCK, fcntl.fcntl(opened, F_OFD_GETLK, asked))
            if answer[0] != fcntl.F_UNLCK:
                return True
    finally:
        os.close(opened)
    return False


def identify(path: str, pid: int | None, *, written: bool = False) -> FileId | None:
    """The regular file that this path names itself (not through a link); None where none.

    One that is `written` has to be open for that.
    `pid` is QEMU's: the file has to be the one that it has open, not another of that name on
    this host. Where its files can't be looked at, its Unix socket has to do as a proof that it
    runs here, and QEMU's lock on the file that it is no other; without these nothing is known.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or pid is None:
        return None
    known = FileId(found.st_dev, found.st_ino)
    opened = open_files(pid)
    if opened:
        fits = writes(pid, known) if written else known in opened.values()
        return known if fits else None
    try:
        return known if is_locked(path) else None
    except OSError:
        return None


# -- where it can be looked at --------------------------------------------------------------------


class Place(NamedTuple):
    """Where a file of QEMU's can be looked at from here; an empty `path` for the `reason`."""

    path: str
    reason: str = ""


def locate(
    filename: str,
    *,
    pid: int | None,
    cwd: str | None = None,
    opened: Mapping[int, FileId] | None = None,
) -> Place:
    """The path that reaches the file that QEMU (process `pid`) has open by this name.

    `cwd` is QEMU's working directory, `opened` are its open files where they were read just now.
    Without a pid (a TCP monitor) nothing proves that QEMU runs here. A path that exists here but is
    not what QEMU has open is not used either.
    """
    if not pid:
        return Place("", "QEMU is not known to run on this host")
    if ":" in filename.split("/", maxsplit=1)[0]:
        return Place("", f"'{filename}' is no file of this host")
    if filename.startswith(FDSET):
        return Place("", f"QEMU was given the open file '{filename}', which has no name here")
    path = os.path.join(cwd or _link(f"/proc/{pid}/cwd") or os.getcwd(), filename)
    root = _root(pid)
    if root is None:
        return Place("", f"QEMU (process {pid}) has its own file systems, which can't be read here")
    try:
        path = _inside(root, path) if os.path.isabs(filename) or not root else (
            f"/proc/{pid}/cwd/{filename}"
        )  # fmt: skip
        found = os.stat(path)
    except OSError as error:
        return Place("", f"'{filename}' can't be looked at from here: {error.strerror}")
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        return Place("", f"'{filename}' is neither a regular file nor a block device")
    opened = open_files(pid) if opened is None else opened
    if opened and FileId.of(found) not in opened.values():
        return Place("", f"QEMU (process {pid}) has another file open than '{filename}' is now")
    return Place(path)


def names_are_ours(pid: int | None) -> bool:
    """Whether an absolute file name means here what it means to QEMU (process `pid`).

    It runs on this host, and is not seen to have file systems of its own.
    """
    return bool(pid) and _root(pid or 0) == ""


def _inside(root: str, path: str) -> str:
    """`path` below another root; its absolute links, which that root is for, are followed."""
    if not root:
        return path
    path = os.path.normpath(path)
    for _ in range(40):
        done = root
        parts = path.strip("/").split("/")
        for number, part in enumerate(parts):
            done = f"{done}/{part}"
            target = _link(done)
            if target is not None:
                here = "/" + "/".join(parts[:number])
                rest = parts[number + 1 :]
                path = os.path.normpath(os.path.join(here, target, *rest))
                break
        else:
            return root + path
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def _root(pid: int) -> str | None:
    """What to put before QEMU's absolute paths: nothing where it sees what we see."""
    try:
        theirs = os.stat(f"/proc/{pid}/ns/mnt").st_ino, os.readlink(f"/proc/{pid}/root")
        mine = os.stat("/proc/self/ns/mnt").st_ino, os.readlink("/proc/self/root")
    except OSError:
        return ""  # not ours to ask (another user's process): its Unix socket is on this host
    if theirs == mine:
        return ""
    root = f"/proc/{pid}/root"
    return root if os.access(root, os.X_OK) else None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


# -- a name that QEMU shows -----------------------------------------------------------------------


class Named(NamedTuple):
    """What a file name of QEMU's means: the "same" file that it has open, another, or none.

    `here` is a path that leads to the very file from here, empty where there is none; `reason`
    says in words what is not as it should be. `astray` is the name that certainly leads to another
    file, or to none, from here.
    """

    verdict: Literal["same", "other", "gone", "unknown"]
    here: str = ""
    reason: str = ""
    astray: bool = False


class OpenFiles:
    """The files that QEMU (process `pid`) has open, and how it sees others by their names.

    `names` are all that it shows: a process that has none of them open is not QEMU's own (it
    only passes the monitor on), and nothing is known. `cwd` is QEMU's working directory.
    """

    def __init__(
        self,
        pid: int | None,
        names: Iterable[str],
        *,
        cwd: str | None = None,
        fdsets: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._pid, self._cwd, self._fdsets = pid, cwd, fdsets or {}
        self._opened = open_files(pid) if pid else {}
        self._root = _root(pid) if pid else None
        self._known = set(self._opened.values())
        self._names = list(names)
        self._is_qemu = bool(self._opened) and any(map(self._recognised, self._names))

    @classmethod
    def of(cls, graph: BlockGraph, pid: int | None, *, cwd: str | None = None) -> OpenFiles:
        """Those of the QEMU that has this block graph."""
        return cls(pid, host_files(graph), cwd=cwd, fdsets=graph.fdsets)

    def of_process(self, pid: int | None) -> Mapping[int, FileId] | None:
        """The open files of that process by descriptor; None where these are another one's."""
        return self._opened if pid == self._pid else None

    def named(self, filename: str) -> Named:
        """What the name of a file or block device means, which QEMU shows for a node."""
        if not self._pid:
            return Named("unknown", reason="QEMU is not known to run on this host")
        if filename.startswith(FDSET):
            return self._given_open(filename)
        ours = self._from_here(filename)
        here = file_id(ours)
        if not self._is_qemu:
            return self._by_lock(filename, ours)
        reached = ours if here is not None and here in self._known else ""
        if self._root is None and not reached:
            reason = f"QEMU (process {self._pid}) has its own file systems"
            return Named(
                "unknown", reason=f"{reason}, and '{filename}' is not its file here", astray=True
            )
        theirs = file_id(self._in_its_view(filename)) if self._root is not None else here
        if theirs in self._known and theirs is not None:
            if reached and here == theirs:
                return Named("same", reached)
            return Named(
                "same",
                reason=f"'{filename}' is another file in the view of QEMU (process {self._pid})"
                " than here",
                astray=True,
            )
        if theirs is None and reached:  # it has changed its root since it opened it
            return Named("same", reached)
        left = self._left_behind(filename)
        if theirs is None:
            reason = f"no file has the name '{filename}' any more{left}"
            return Named("gone", reason=reason, astray=True)
        reason = f"'{filename}' is another file now than QEMU has open{left}"
        return Named("other", reason=reason, astray=True)

    def has_name(self, file: FileId) -> bool:
        """Whether QEMU has this very file open, and it can be found by any name."""
        for number, opened in self._opened.items():
            if opened == file:
                with suppress(OSError):
                    return os.stat(f"/proc/{self._pid}/fd/{number}").st_nlink > 0
        return False

    def _given_open(self, filename: str) -> Named:
        """What QEMU was given by descriptor: the kernel tells what it is called."""
        numbers = [n for n in self._fdsets.get(filename, ()) if n in self._opened]
        files = {self._opened[number] for number in numbers}
        if len(files) != 1:
            reason = f"QEMU was given the open file '{filename}'"
            return Named("unknown", reason=reason, astray=True)
        link = f"/proc/{self._pid}/fd/{numbers[0]}"
        path = _link(link) or ""
        if file_id(path) in files:
            reason = f"QEMU was given the open file '{filename}', which is {path}"
            return Named("same", path, reason, astray=True)
        if not self.has_name(*files):
            reason = f"the open file '{filename}' that QEMU was given has no name any more"
            return Named("gone", reason=f"{reason} ({path})", astray=True)
        reason = f"QEMU was given the open file '{filename}' ({path})"
        return Named("unknown", reason=reason, astray=True)

    def _by_lock(self, filename: str, ours: str) -> Named:
        """Without a sight of QEMU's files its lock on one of this name has to do."""
        if not self._opened:
            with suppress(OSError):
                if is_locked(ours):
                    return Named("same", ours)
            reason = f"the open files of QEMU (process {self._pid}) can't be looked at from here"
        else:
            reason = f"process {self._pid} answers for QEMU, and has none of its files open"
        return Named("unknown", reason=f"whether '{filename}' is what QEMU has open: {reason}")

    def _from_here(self, filename: str) -> str:
        """The path from here, if QEMU sees what we see."""
        return os.path.join(self._cwd or _link(f"/proc/{self._pid}/cwd") or os.getcwd(), filename)

    def _in_its_view(self, filename: str) -> str:
        """The path from here through QEMU's own root or working directory."""
        if not os.path.isabs(filename):
            return f"/proc/{self._pid}/cwd/{filename}"
        for own, seen in (("/dev/fd/", "fd/"), ("/proc/self/", "")):
            if filename.startswith(own):
                return f"/proc/{self._pid}/{seen}{filename.removeprefix(own)}"
        try:
            return _inside(self._root or "", filename)
        except OSError:
            return ""

    def _recognised(self, name: str) -> bool:
        for path in {self._from_here(name), self._in_its_view(name)}:
            if file_id(path) in self._known:
                return True
        return os.path.basename(name) in map(_named, self._links)

    @property
    def _links(self) -> dict[str, FileId]:
        """What the kernel calls the open files now; their former name where they have none."""
        links = {_link(f"/proc/{self._pid}/fd/{n}"): self._opened[n] for n in self._opened if n > 2}
        return {path: file for path, file in links.items() if path and path.startswith("/")}

    def _left_behind(self, filename: str) -> str:
        """What QEMU has open that no name leads to, and that this one may have meant."""
        meant = {file_id(self._from_here(name)) for name in self._names}
        folder, name = os.path.split(self._from_here(filename))
        strange = [
            path
            for path, file in sorted(self._links.items())
            if file not in meant and (os.path.dirname(path) == folder or _named(path) == name)
        ]
        return f" (it has {', '.join(strange)} open)" if strange else ""


def _named(path: str) -> str:
    return os.path.basename(path).removesuffix(" (deleted)")


def host_files(graph: BlockGraph) -> list[str]:
    """The names of all files of the host that QEMU has open."""
    found = (n.raw.get("file") for n in graph.nodes.values() if n.driver in HOST_FILES)
    return [str(name) for name in found if name]


def storage(graph: BlockGraph, name: str) -> list[Node]:
    """The protocol nodes in which a layer keeps its bytes: its file's and its data file's."""
    found: list[Node] = []
    todo, seen = [name], {name}
    while todo:
        node = graph.nodes.get(todo.pop())
        if node is None:
            continue
        below = [child for edge, child in node.children.items() if edge != "backing"]
        if not below:
            found.append(node)
        todo += [each for each in below if each not in seen]
        seen.update(below)
    return found


def astray(graph: BlockGraph, opened: OpenFiles, layer: str) -> str:
    """Why a layer's name does not lead to its file from here; "" where it does, or may."""
    for node in storage(graph, layer):
        name = str(node.raw.get("file") or "")
        if node.driver not in HOST_FILES or not name:
            continue
        if not os.path.isabs(name) and graph.cwd is None:
            return f"'{name}' counts from QEMU's working directory, which is not known here"
        told = opened.named(name)
        if told.astray:
            return told.reason
    return ""


def told_where(graph: BlockGraph, opened: OpenFiles, image: Image) -> Image:
    """The image, with a warning where its name does not lead to its file from here."""
    why = astray(graph, opened, image.node_name) if image.node_name in graph.nodes else ""
    if not why or why == image.astray:
        return image
    return replace(image, astray=why, warnings=(*image.warnings, why))


def all_told_where(graph: BlockGraph, pid: int | None, disks: Iterable[Disk]) -> list[Disk]:
    """`told_where` for all layers of these disks; looks at files."""
    opened = OpenFiles.of(graph, pid, cwd=graph.cwd)
    return [
        replace(disk, chain=tuple(told_where(graph, opened, image) for image in disk.chain))
        for disk in disks
    ]


def unnamed(graph: BlockGraph, opened: OpenFiles, layer: str, known: FileId | None) -> str:
    """Why a layer's data are in no file that has a name, or may be; "" where they are in one.

    `known` is the layer's own file, where it was seen before: it may have got another name.
    """
    for node in storage(graph, layer):
        if node.driver not in HOST_FILES:
            continue
        name = str(node.raw.get("file"))
        told = opened.named(name)
        moved = told.verdict == "gone" and known is not None and opened.has_name(known)
        if told.verdict != "same" and not moved:
            return told.reason
    return ""
