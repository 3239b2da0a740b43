"""Make ``qmpcommit.pyz``: the command as one file, to copy to a host that has but Python.

    python examples/make_zipapp.py [OUT]        # beside it: ./qmpcommit.pyz chain QMP

It holds what is installed here: qmpcommit and the packages that it and its command need, not those
of its other extras (so not the daemon's). One of them, pydantic-core, is compiled, and a compiled
module can't be imported from a zip: the file unpacks it when it is first run, into a folder of its
user alone, ``$XDG_CACHE_HOME/qmpcommit`` or ``~/.cache/qmpcommit``, or for this one run where there
is no such place. So the file serves the version of Python, the system and the processor that it was
made with; it says so on another one. Make one with each Python that your hosts have.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sys
import sysconfig
import tempfile
import zipapp
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

import qmpcommit

MAIN = '''\
"""The command out of one file; made by examples/make_zipapp.py of qmpcommit."""
import os
import sys
import sysconfig

MADE_FOR = {made_for!r}
DIGEST = {digest!r}


def ours(place):
    """Whether it is a folder into which nobody else can have put anything."""
    try:
        found = os.lstat(place)
    except OSError:
        return False
    return found.st_uid == os.geteuid() and found.st_mode & 0o170022 == 0o040000


def unpacked():
    """The folder of what is compiled."""
    import atexit
    import shutil
    import tempfile
    import zipfile

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = os.path.join(cache, "qmpcommit")
    place = os.path.join(home, DIGEST)
    if ours(home) and ours(place):
        return os.path.join(place, "compiled")
    made = ""
    try:
        os.makedirs(home, mode=0o700, exist_ok=True)
        if ours(home):
            made = tempfile.mkdtemp(dir=home)
    except OSError:
        pass
    lasts = bool(made)
    if not lasts:
        made = tempfile.mkdtemp(prefix="qmpcommit-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
    with zipfile.ZipFile(sys.path[0]) as archive:
        archive.extractall(made, [n for n in archive.namelist() if n.startswith("compiled/")])
    if lasts:
        try:
            os.rename(made, place)
        except OSError:  # another one was quicker
            shutil.rmtree(made, ignore_errors=True)
        if not ours(place):
            sys.exit("qmpcommit: " + place + " is somebody else's: remove it")
        made = place
    return os.path.join(made, "compiled")


here = [list(sys.version_info[:2]), sysconfig.get_platform()]
if here != MADE_FOR:
    (major, minor), platform = MADE_FOR
    sys.exit(f"qmpcommit: this file was made for Python {{major}}.{{minor}} on {{platform}}; run it"
             " with that one, or make another (examples/make_zipapp.py)")
sys.path.insert(1, unpacked())

from qmpcommit.__main__ import main  # noqa: E402

main()
'''


def needed(name: str) -> Iterator[Distribution]:
    """A package that is installed here, and all that it needs without its extras."""
    waiting, seen = [name], set[str]()
    while waiting:
        found = importlib.metadata.distribution(waiting.pop())
        called = re.sub(r"[-_.]+", "-", found.name).lower()
        if called in seen:
            continue
        seen.add(called)
        yield found
        for line in found.requires or ():
            requirement, _, marker = line.partition(";")
            extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", marker)
            wanted = extra is None or (called, extra[1]) == ("qmpcommit", "cli")
            if wanted and _applies(marker):
                match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
                assert match
                waiting.append(match[0])


def _applies(marker: str) -> bool:
    """Whether it is needed with this Python; of what else a marker can say none is met here."""
    match = re.search(r"python_version\s*<\s*[\"']([0-9.]+)", marker)
    return not match or sys.version_info[:2] < tuple(map(int, match[1].split(".")[:2]))


def files_of(package: Distribution) -> dict[str, Path]:
    """Its files, by where they belong; those of qmpcommit are where it is imported from."""
    if package.name == "qmpcommit":
        folder = Path(qmpcommit.__file__).parent
        found = {str(Path("qmpcommit", p.relative_to(folder))): p for p in folder.rglob("*")}
    else:
        found = {str(p): Path(str(p.locate())) for p in package.files or ()}
    return {
        name: path
        for name, path in found.items()
        if path.is_file() and not name.startswith("..") and "__pycache__" not in name
    }


def main() -> None:
    """Make it."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "qmpcommit.pyz")
    digest = hashlib.sha256(sysconfig.get_platform().encode())
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for package in needed("qmpcommit"):
            files = files_of(package)
            compiled = any(path.suffix == ".so" for path in files.values())
            for called, path in sorted(files.items()):
                target = root / ("compiled" if compiled else "") / called
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                if compiled:
                    digest.update(called.encode() + path.read_bytes())
        made_for = [list(sys.version_info[:2]), sysconfig.get_platform()]
        text = MAIN.format(made_for=made_for, digest=digest.hexdigest()[:32])
        (root / "__main__.py").write_text(text)
        zipapp.create_archive(root, out, "/usr/bin/env python3", compressed=True)
    print(f"{out}: {out.stat().st_size >> 10} KiB, for Python {sys.version_info[0]}."
          f"{sys.version_info[1]} on {sysconfig.get_platform()}")  # fmt: skip


if __name__ == "__main__":
    main()
