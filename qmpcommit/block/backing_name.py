"""The name that an overlay's header must carry for the image below it.

Right is a name that leads to the very file that QEMU has open: on real paths, so that it goes on
doing so when a link or a merged layer's folder is gone, as QEMU sees its files, and plain, unless
there is no plain name (a slice of a raw file, a qcow2 inside one). Nothing here writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from qmpcommit.block.files import read_header
from qmpcommit.block.graph import FDSET, FILTERS, BlockGraph
from qmpcommit.block.identity import HOST_FILES, FileId, file_id, names_are_ours, open_files
from qmpcommit.block.network_name import (
    Export,
    export_of,
    json_options,
    shown_export,
    written_export,
)
from qmpcommit.errors import ChainError

_MOST_LINKS = 40


class BackingName(NamedTuple):
    """What is written into a header: the name itself, and the format of what it names."""

    text: str
    format: str

    @property
    def relative(self) -> bool:
        """Whether it counts from the overlay's own folder."""
        return is_relative(self.text)


_PROTOCOLS = HOST_FILES | {"nbd", "ssh", "rbd", "iscsi", "gluster", "nfs", "http", "https", "ftp"}


def is_protocol(fmt: str) -> bool:
    """Whether QEMU wrote a protocol's name for the format of bare bytes, which "raw" says."""
    return fmt in _PROTOCOLS


def is_relative(text: str) -> bool:
    """Whether a header's name counts from the folder of the image that carries it."""
    return bool(text) and not text.startswith("/") and ":" not in text.split("/", maxsplit=1)[0]


# -- what an image is made of -----------------------------------------------------------------


class Parts(NamedTuple):
    """An image, taken apart: its formats from the outside in, and what holds its bytes.

    A raw format shows what it holds, so it is one of `formats` only with an `offset` or `size`.
    `name` is the file of a host driver, a URI, or empty where `options` alone tell.
    """

    formats: tuple[tuple[tuple[str, Any], ...], ...]
    driver: str
    name: str
    options: Mapping[str, Any]

    @property
    def format(self) -> str:
        """The outermost format: "raw" for bare bytes, whatever holds them."""
        return str(dict(self.formats[0])["driver"]) if self.formats else "raw"

    @property
    def plain(self) -> bool:
        """Whether a plain file name (or URI) and a format say all of it."""
        known = bool(self.name)
        return known and (
            not self.formats or (self.formats[1:] == () and len(self.formats[0]) == 1)
        )

    @property
    def on_host(self) -> bool:
        """Whether it is in a file of a host."""
        return self.driver in HOST_FILES

    def as_json(self, name: str, *, bare: bool = False) -> str:
        """All of it as QEMU's options, with this file name; `bare` without a format over it."""
        inner: dict[str, Any] = {"driver": self.driver, "filename": name} if name else {
            key: value for key, value in self.options.items() if key != "backing"
        }  # fmt: skip
        plain = () if bare else ((("driver", "raw"),),)
        for layer in reversed(self.formats or plain):
            inner = {**dict(layer), "file": inner}
        return f"json:{json.dumps(inner)}"


def parts_of(graph: BlockGraph, name: str) -> Parts:
    """The parts of a node; filters, which are no part of the image, are seen through."""
    formats: list[dict[str, Any]] = []
    node = graph.nodes[name]
    seen = {name}
    while True:
        below = node.below if node.driver in FILTERS else node.children.get("file")
        if below is None or below in seen or below not in graph.nodes:
            break
        if node.driver not in FILTERS:
            options = json_options(str(node.raw.get("file"))) if node.driver == "raw" else {}
            formats.append({"driver": node.driver} | _window(options))
        seen.add(below)
        node = graph.nodes[below]
    shown = str(node.raw.get("file") or "")
    shown = graph.given.get(shown, shown)  # it was given open, and has this name
    return _parts(formats, node.driver, shown, json_options(shown))


def _window(options: Mapping[str, Any]) -> dict[str, int]:
    """What a raw format shows of what it holds, where that is not all."""
    return {key: int(options[key]) for key in ("offset", "size") if options.get(key)}


def _parts(
    formats: Iterable[Mapping[str, Any]], driver: str, shown: str, options: Mapping[str, Any]
) -> Parts:
    kept = [dict(each) for each in formats]
    kept = [each for each in kept if each != {"driver": "raw"}]
    return Parts(
        tuple(tuple(sorted(each.items())) for each in kept),
        driver,
        shown if driver in HOST_FILES or not shown.startswith("json:") else "",
        options,
    )


def parts_of_name(text: str, fmt: str) -> Parts:
    """The parts of what a header's name and format mean; a relative name stays relative.

    Where neither tells a format, it is called "".
    """
    options = json_options(text)
    if not options:
        plain = text if is_relative(text) or text.startswith("/") else ""
        if text.startswith("file:"):
            plain = text.removeprefix("file:").removeprefix("//")
        outer = [] if fmt == "raw" or is_protocol(fmt) else [{"driver": fmt}]
        if plain:
            return _parts(outer, "file", plain, {})
        return _parts(outer, text.partition(":")[0].partition("+")[0], text, {})
    formats: list[dict[str, Any]] = []
    driver = str(options.get("driver") or fmt)
    while isinstance(options.get("file"), Mapping):
        window = _window(options) if driver == "raw" else {}
        formats.append({"driver": driver} | window)
        options = options["file"]
        driver = str(options.get("driver") or "file")
    name = str(options.get("filename") or "")
    return _parts(formats, driver, name, options)


# -- the files as QEMU sees them ----------------------------------------------------------------


class View(NamedTuple):
    """QEMU's files, looked at from here.

    `root` goes before QEMU's absolute paths: "" where it sees what we see, None where its files
    can't be looked at. `cwd` is its working directory as it calls it. `opened` are the files that
    it has open; empty where that can't be known.
    """

    root: str | None = None
    cwd: str | None = None
    opened: frozenset[FileId] = frozenset()

    @classmethod
    def of(
        cls, pid: int | None, cwd: str | None, opened: Mapping[int, FileId] | None = None
    ) -> View:
        """Of QEMU's process (None: not on this host); `cwd` as the process shows it here.

        `opened` are its open files where they were read just now.
        """
        if not pid:
            return cls(cwd=cwd)
        root = "" if names_are_ours(pid) else f"/proc/{pid}/root"
        if root and not os.access(root, os.X_OK):
            return cls(cwd=cwd)
        jail = _link(root) if root else None
        if jail and cwd is not None and cwd.startswith(f"{jail}/"):
            cwd = cwd.removeprefix(jail)
        opened = open_files(pid) if opened is None else opened
        return cls(root, cwd, frozenset(opened.values()))

    def id(self, path: str) -> FileId | None:
        """The file that this absolute path of QEMU's leads to; None where none can be seen."""
        if self.root is None:
            return None
        return file_id(self.root + self.real(path) if self.root else path)

    def real(self, path: str, *, last: bool = True) -> str:
        """An absolute path with its links followed; the `last` part's own link only if wanted."""
        if self.root is None:
            return path
        todo, done, followed = path.split("/")[::-1], "", 0
        while todo:
            part = todo.pop()
            if part in ("", "."):
                continue
            if part == "..":
                done = done.rpartition("/")[0]
                continue
            step = f"{done}/{part}"
            is_last = not any(rest not in ("", ".") for rest in todo)
            target = None if is_last and not last else _link(self.root + step)
            if target is None or followed == _MOST_LINKS:
                done = step
                continue
            followed += 1
            done = "" if target.startswith("/") else done
            todo += target.split("/")[::-1]
        return done or "/"


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


# -- the name -------------------------------------------------------------------------------------


def name_below(
    graph: BlockGraph,
    base: str,
    overlay: str,
    view: View,
    *,
    through: Sequence[str] = (),
    relative: bool | None = None,
    bare: bool = False,
) -> BackingName:
    """The name that the overlay in the file `overlay` must carry for the node `base`.

    `through` are the layers by whose headers the base was found so far, the overlay's own first
    or the one that it follows. The last one's name for the base is preferred where there are
    several (of a link, a logical volume, an export). With `relative` it counts from the overlay's
    folder, where such a name leads there; None keeps it so if all of `through` had it so. `bare`
    is for a QEMU that writes a protocol's name for the format of a base without one. Looks at
    files, so that it belongs in a thread.

    Raises `ChainError` where nothing that can be written means that image.
    """
    if base not in graph.nodes:
        raise ChainError(f"QEMU has no node {base} any more")
    parts = parts_of(graph, base)
    text = _said(graph, through[-1], view) if through else ""
    known = _known(graph, through[-1], text, view) if text else None
    if not parts.on_host:
        return BackingName(_network(parts, known, text, view, bare=bare), parts.format)
    path = _path(graph, base, known, view, links=False)
    if path is None:
        return BackingName(_from_cwd(parts, overlay), parts.format)
    if not parts.plain:
        return BackingName(parts.as_json(path), parts.format)
    kept = relative is None and _moves_along(graph, overlay, through, view)
    if relative or kept:
        near = _path(graph, base, known, view, links=True) or path
        found = relative_name(near, overlay, view)
        if found is not None and (
            relative or _climbs(found) <= _climbs(_joined(graph, through, view))
        ):
            return BackingName(found, parts.format)
    return BackingName(path, parts.format)


def _written(graph: BlockGraph, name: str) -> str:
    """The backing file's name in a layer's header, as QEMU read or wrote it last."""
    if name not in graph.nodes:
        return ""
    info = graph.nodes[name].raw.get("image") or {}
    return str(info.get("backing-filename") or "")


def _said(graph: BlockGraph, name: str, view: View) -> str:
    """The same, but a relative name on disk where QEMU has an absolute one of the same file.

    Those of fresh overlays are written so.
    """
    text = _written(graph, name)
    found = view.id(text) if text.startswith("/") else None
    if found is None:
        return text
    written = next(written_below(graph, name, view))
    folder = _folder(parts_of(graph, name), view)
    if folder is None or not is_relative(written.text):
        return text
    return written.text if view.id(os.path.join(folder, written.text)) == found else text


def _moves_along(graph: BlockGraph, overlay: str, through: Sequence[str], view: View) -> bool:
    """Whether all names on the way were relative, so that overlay and base could move as one."""
    if not through or not all(is_relative(_said(graph, name, view)) for name in through):
        return False
    full, folder = _full(overlay, view), _folder(parts_of(graph, through[0]), view)
    if full is None or folder is None:
        return False
    return view.real(os.path.dirname(full)) == view.real(folder)


def _joined(graph: BlockGraph, through: Sequence[str], view: View) -> str:
    """The headers' relative names, put together."""
    text = ""
    for name in through:
        text = os.path.join(os.path.dirname(text), _said(graph, name, view))
    return os.path.normpath(text)


def _climbs(text: str) -> int:
    """How many folders a relative name goes up: through those above, a move breaks it."""
    return text.split("/").count("..")


def _known(graph: BlockGraph, above: str, text: str, view: View) -> Parts | None:
    """What the header of the layer above says of the base, its path made absolute."""
    info = graph.nodes[above].raw.get("image") or {}
    found = parts_of_name(text, str(info.get("backing-filename-format") or ""))
    if not found.on_host or found.name.startswith("/"):
        return found
    folder = _folder(parts_of(graph, above), view)
    return None if folder is None else found._replace(name=os.path.join(folder, found.name))


def _folder(parts: Parts, view: View) -> str | None:
    """The folder, as QEMU calls it, from which an image's relative names count."""
    named = parts.on_host and not parts.name.startswith(FDSET)
    path = _full(parts.name, view) if named else None
    return None if path is None else os.path.dirname(path)


def _full(name: str, view: View) -> str | None:
    if name.startswith("/"):
        return name
    return None if view.cwd is None else os.path.join(view.cwd, name)


def _path(
    graph: BlockGraph, base: str, known: Parts | None, view: View, *, links: bool
) -> str | None:
    """The base's absolute path that a header may carry; None where QEMU's own folder is unknown.

    A device's link is kept, for what it leads to is called otherwise after the next start. With
    `links` that of a file is kept as well where the header above has it: it may move along. Any
    is kept beside which alone the base's own backing file is found by its name.
    """
    parts = parts_of(graph, base)
    if parts.name.startswith(FDSET):
        written = known.name if known is not None and known.on_host else ""
        if written and view.id(written) in view.opened:
            return view.real(written, last=False)
        raise ChainError(
            f"QEMU has the image open by a file descriptor ({parts.name}, from add-fd), which means"
            " nothing once it has ended, and no header tells its name: have QEMU open that image"
            " by its name. Nothing was sent"
        )
    path = _full(parts.name, view)
    if path is None or view.root is None:
        return path
    wanted = _wanted(path, view)
    tried = _spellings(path, known, view, links=links)
    if wanted is not None:
        tried = [each for each in tried if view.id(each) in wanted]
    whole = (each for each in tried if _leads_on(graph, base, each, view))
    return next(whole, tried[0] if tried else path)


def _leads_on(graph: BlockGraph, layer: str, path: str, view: View) -> bool:
    """Whether what QEMU has below a layer is found where that is opened by this path.

    A relative name in its header counts from the folder of the name, not of the file itself.
    """
    for above, below in pairwise(graph.chain(layer)):
        text = next(written_below(graph, above, view)).text
        if not text.startswith("/") and not is_relative(text):
            break
        path = os.path.join(os.path.dirname(path), text)
        if _same_file(parts_of(graph, below).name, path, view) == "other":
            return False
    return True


def _wanted(path: str, view: View) -> set[FileId] | None:
    """The files that a name of the base may lead to; None where QEMU's can't be told."""
    leads = view.id(path)
    if leads is not None and (not view.opened or leads in view.opened):
        return {leads}
    return set(view.opened) or None


def _spellings(path: str, known: Parts | None, view: View, *, links: bool) -> list[str]:
    written = [known.name] if known is not None and known.on_host else []
    found = view.id(path)
    if found is not None and found.device == -1:  # a block device
        kept = [view.real(each, last=False) for each in (*written, path)]
        return sorted(kept, key=lambda each: os.path.basename(each).startswith("dm-"))
    near = [view.real(each, last=False) for each in written] if links else []
    return [*near, view.real(path), view.real(path, last=False)]


def relative_name(path: str, overlay: str, view: View) -> str | None:
    """The name by which an image at `path` is found from an overlay's folder, or None.

    An overlay that is itself a link has two folders; the name has to mean the same from both.
    Where the folders can't be seen, only a name that does not go up is sure to.
    """
    full = _full(overlay, view)
    if full is None:
        return None
    folder = view.real(os.path.dirname(full))
    text = os.path.relpath(path, folder)
    if view.root is None:
        return None if _climbs(text) else _spelled(text)
    for each in {folder, os.path.dirname(view.real(full))}:
        if view.id(os.path.join(each, text)) != view.id(path):
            return None
    return _spelled(text)


def detours(path: str) -> list[str]:
    """The folders that an absolute path goes into only to leave them (``..``)."""
    parts = path.split("/")
    return ["/".join(parts[:place]) or "/" for place, part in enumerate(parts) if part == ".."]


def is_within(path: str, folder: str) -> bool:
    """Whether a path is a folder, or below it."""
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _spelled(text: str) -> str:
    """A relative name that is taken for no URI."""
    return text if is_relative(text) else f"./{text}"


def _from_cwd(parts: Parts, overlay: str) -> str:
    """Where QEMU's folder is not known, only what counts from the same one can be named."""
    if parts.plain and not overlay.startswith("/"):
        return _spelled(os.path.relpath(parts.name, os.path.dirname(overlay)))
    raise ChainError(
        f"QEMU has the base {parts.name} open by a name that counts from its working directory,"
        f" which is not known here, and would write it into {overlay}, where it means another"
        " file. Use QEMU's Unix socket on its own host. Nothing was sent"
    )


def _network(parts: Parts, known: Parts | None, text: str, view: View, *, bare: bool) -> str:
    """The name of an image that is in no file of this host."""
    mine = shown_export(parts.name) or export_of(parts.options)
    if mine is None:
        return parts.name if parts.plain else parts.as_json("", bare=bare)
    mine = mine._replace(path=(_full(mine.path, view) or mine.path) if mine.path else "")
    alike = known is not None and known.format in ("", parts.format) and not bare
    if known is not None and alike and _export(known) == mine:
        return text
    if parts.plain and mine.uri:
        return mine.uri
    return parts._replace(options=parts.options or mine.options).as_json("", bare=bare)


def _export(written: Parts) -> Export | None:
    """The NBD export that a header's name means."""
    return written_export(written.name) if written.name else export_of(written.options)


# -- what a header says -----------------------------------------------------------------------


ON_DISK = "its header on disk"


class Written(NamedTuple):
    """What an overlay says of the image below it: the name, its format, and who says so."""

    text: str
    format: str
    source: str


def written_below(graph: BlockGraph, overlay: str, view: View) -> Iterator[Written]:
    """What the header on disk says, where it can be read from here, and what QEMU read of it."""
    node = graph.nodes[overlay]
    parts = parts_of(graph, overlay)
    path = _full(parts.name, view) if parts.on_host and parts.plain else None
    if node.driver == "qcow2" and path is not None and view.root is not None:
        try:
            header = read_header(view.root + view.real(path))
        except OSError:
            header = None
        if header is not None:
            yield Written(header.backing, header.backing_format, ON_DISK)
    info = node.raw.get("image") or {}
    fmt = str(info.get("backing-filename-format") or "")
    yield Written(_written(graph, overlay), fmt, "as QEMU read it")


Verdict = Literal["same", "part", "other", "unknown"]
"""How a header's name compares with what QEMU has.

"part": the same file, but another part of it (a slice), or in another format; "unknown": nobody
can tell from here.
"""


def leads_to(graph: BlockGraph, overlay: str, below: str, written: Written, view: View) -> Verdict:
    """Whether what an overlay's header says means the node `below`.

    Files are compared, never names alone, where they can be seen from here.
    """
    if written.text.startswith("json:") and not json_options(written.text):
        return "other"
    it, named = parts_of(graph, below), parts_of_name(written.text, written.format)
    if it.on_host != named.on_host:
        return "unknown"
    if not it.on_host:
        found = _same_export(it, named)
    else:
        folder = _folder(parts_of(graph, overlay), view)
        found = _same_file(it.name, os.path.join(folder or "", named.name), view)
    alike = it.formats == named.formats if named.format else it.plain
    return found if alike or found != "same" else "part"


def _same_export(it: Parts, named: Parts) -> Verdict:
    mine, other = shown_export(it.name) or export_of(it.options), _export(named)
    if mine is not None and other is not None:
        return "same" if mine == other else "other"
    return "same" if it.name == named.name and it.options == named.options else "unknown"


def _same_file(mine: str, other: str, view: View) -> Verdict:
    """Whether a name leads to what QEMU has open by another name."""
    path = _full(mine, view)
    if view.root is None or path is None or not other.startswith("/"):
        alike = os.path.normpath(path or mine) == os.path.normpath(other)
        return "same" if alike else "unknown"
    has, leads = view.id(path), view.id(other)
    if has is None or (view.opened and has not in view.opened):
        return "same" if leads in view.opened else "unknown"
    return "same" if leads == has else "other"
