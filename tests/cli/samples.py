"""The samples of a text: what its fenced blocks say is done, and what came of it is compared.

* ``console``: each line after ``$`` is given to a shell, and what is printed has to be what stands
  below it, but for what differs from run to run;
* ``sh``: each line is a command of its own on VMs of its own, and ends with the status that its
  comment tells (``# status 3``), or else with 0;
* ``python``: the body of a coroutine, with ``qc``, ``vm``, ``vm1``, ``vm2`` and some callables;
* ``toml`` is a configuration of the daemon's, which it has to find right;
* ``text`` is no sample.

A second word after the language says what the block has: ``daemon`` (one that knows the VMs
``web1`` and ``db1``), or ``bare`` (nothing but an empty folder; what it starts with
``-pidfile qemu.pid`` is ended).
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient

import qmpcommit as qc
from tests.cli.command import COMMAND, ENVIRONMENT, qmpcommit
from tests.daemon.daemons import daemon
from tests.ground.images import Chain, make_chain
from tests.ground.machines import machine

VARIES = (
    (r"\d[\d.]* (B|[KMGT]iB)\b", "SIZE"),
    (r"\d[\d.:]* (ms|s|min|h)\b", "TIME"),
    (r"#block\d+", "#block"),
    (r"  +(?=\S)", "  "),  # tables are as wide as what is in them
    (r"(qmpcommit-[a-z]+)-[0-9a-f]{8}", r"\1-ID"),
    (r"\b(process|pid) \d+", r"\1 N"),
    (r"\b\d+\.\d+\.\d+  ", "VERSION  "),
    (r"\d{4}-\d\d-\d\d[T ][\d:.]+(Z|\+00:00)?", "WHEN"),
)
"""What differs from run to run, and what it becomes."""

HOME = "/vms/web1"
"""The folder of the samples, as they call it."""


@dataclass(frozen=True)
class Sample:
    """One fenced block, and the line on which it begins."""

    language: str
    words: frozenset[str]
    text: str
    line: int


def samples(markdown: str) -> Iterator[Sample]:
    """The fenced blocks of a text."""
    for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", markdown, re.DOTALL | re.MULTILINE):
        language, *words = found[1].split() or [""]
        line = markdown.count("\n", 0, found.start()) + 1
        yield Sample(language, frozenset(words), found[2], line)


def alike(text: str, folder: Path | None = None) -> str:
    """A text without what differs from run to run."""
    if folder is not None:
        text = text.replace(str(folder), HOME)
    for pattern, becomes in VARIES:
        text = re.sub(pattern, becomes, text)
    return text


@dataclass
class Scene:
    """Where samples are run: a folder with images, VMs over them, and the command on the path."""

    folder: Path
    environment: dict[str, str]

    async def shell(self, line: str) -> tuple[int, str]:
        """The status, and what was printed."""
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", line), cwd=self.folder, env=self.environment,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(60):
                out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out.decode()


@dataclass
class Pictures:
    """The images of all scenes, made once."""

    folder: Path

    def __post_init__(self) -> None:
        for name in ("disk", "data"):
            make_chain(self.folder, names=(_base(name), name), relative=True)

    def copy(self, folder: Path) -> list[Chain]:
        """Two disks' chains in another folder."""
        folder.mkdir()
        chains = []
        for name in ("disk", "data"):
            files = [folder / f"{each}.qcow2" for each in (_base(name), name)]
            for file in files:
                shutil.copy(self.folder / file.name, file)
            chains.append(Chain(files, []))
        return chains


def _base(name: str) -> str:
    return "base" if name == "disk" else f"{name}-base"


@asynccontextmanager
async def scene(place: Path, pictures: Pictures, sample: Sample) -> AsyncIterator[Scene]:
    """What a sample needs, and no more."""
    web1, db1, tools = place / "web1", place / "db1", place / "bin"
    tools.mkdir()
    command = tools / "qmpcommit"
    command.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    command.chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "QMPCOMMIT_DAEMON": f"{place}/d.sock",
    }
    try:
        async with AsyncExitStack() as stack:
            if "bare" in sample.words:
                web1.mkdir()
            else:
                chains = pictures.copy(web1)
                await stack.enter_async_context(machine(web1, *chains, style="implicit"))
                (web1 / "qmp.sock").symlink_to("qmp")
                if re.search(r"other\.sock|vm2|db1", sample.text):
                    other = pictures.copy(db1)[:1]
                    await stack.enter_async_context(machine(db1, *other, style="implicit"))
                    (web1 / "other.sock").symlink_to("../db1/qmp")
            if "daemon" in sample.words:
                names = [vm for vm in (web1, db1) if vm.exists()]
                known = [f'[[vm]]\nname = "{vm.name}"\nqmp = "{vm}/qmp"\n' for vm in names]
                d = await stack.enter_async_context(daemon(place, "".join(known)))
                for vm in names:
                    await d.connected(vm.name)
            yield Scene(web1, environment)
    finally:
        pidfile = web1 / "qemu.pid"
        if "bare" in sample.words and pidfile.exists():
            await _end(int(pidfile.read_text()))


async def _end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            while True:  # no child of ours: nobody tells
                os.kill(pid, 0)
                await asyncio.sleep(0.01)


async def console(at: Scene, text: str) -> str:
    """What the same lines give now."""
    shown = []
    for command in re.findall(r"^\$ ((?:.*\\\n)*.*)", text, re.MULTILINE):
        _, out = await at.shell(command)
        shown.append(f"$ {command}\n{out}")
    return "".join(shown)


async def python(at: Scene, text: str) -> None:
    """Run the body of a coroutine; raises what it raises."""

    async def back_up(*files: str) -> None:
        assert all(Path(file).exists() for file in files)

    async def is_it_good(ready: Any) -> bool:
        return True

    def address(name: str) -> str:
        return str(at.folder / name)

    body = text.replace(f"{HOME}/", f"{at.folder}/").replace('"vda.ledger"', repr(address("led")))
    body = body.replace("qc.Client()", f"qc.Client({at.environment['QMPCOMMIT_DAEMON']!r})")
    names: dict[str, Any] = {"qc": qc, "QMPClient": QMPClient, "back_up": back_up}
    names |= {"is_it_good": is_it_good, "print": lambda *words: None}
    exec(compile(f"async def body():\n{textwrap.indent(body, '    ')}", "sample", "exec"), names)
    async with AsyncExitStack() as stack:
        if re.search(r"\bvm1?\b", text) and not re.search(r" as (vm|host):", text):
            names["vm"] = await stack.enter_async_context(qc.Session.connect(address("qmp.sock")))
            names["vm1"] = names["vm"]
        if "vm2" in text:
            names["vm2"] = await stack.enter_async_context(
                qc.Session.connect(address("other.sock"))
            )
        async with asyncio.timeout(60):
            await names["body"]()


async def complaint(place: Path, pictures: Pictures, sample: Sample) -> str:
    """What is wrong with a sample, or nothing."""
    if sample.language == "sh":
        wrong = []
        for number, line in enumerate(sample.text.splitlines()):
            folder = place / str(number)
            folder.mkdir()
            one = Sample("sh", sample.words, line, sample.line)
            async with scene(folder, pictures, one) as at:
                status, out = await at.shell(line)
            told = re.search(r"# .*status (\d+)", line)
            if status != (int(told[1]) if told else 0):
                wrong.append(f"{line}\nended with status {status}: {out}")
        return "\n".join(wrong)
    if sample.language == "toml":
        (place / "config.toml").write_text(sample.text)
        said = qmpcommit("daemon", "--config", place / "config.toml", "--check-config")
        return said.err if said.status else ""
    async with scene(place, pictures, sample) as at:
        if sample.language == "python":
            try:
                await python(at, sample.text)
            except Exception as error:
                return f"{sample.text}\nraised {error!r}"
            return ""
        assert sample.language == "console", f"line {sample.line}: what is '{sample.language}'?"
        now = await console(at, sample.text)
        if alike(now, at.folder) == alike(sample.text):
            return ""
        return f"stands there:\n{sample.text}\nis printed:\n{now.replace(str(at.folder), HOME)}"


async def complaints_of(
    markdown: str, place: Path, pictures: Pictures, *, each: int = 1, first: int = 0
) -> list[str]:
    """Of all samples of a text, or of each third, ..., of them."""
    wrong = []
    runnable = [sample for sample in samples(markdown) if sample.language != "text"]
    for number, sample in enumerate(runnable[first::each]):
        folder = place / str(number)
        folder.mkdir()
        said = await complaint(folder, pictures, sample)
        if said:
            wrong.append(f"line {sample.line}: {said}")
        shutil.rmtree(folder)
    return wrong
