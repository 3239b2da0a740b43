"""How much time a commit costs beyond what QEMU itself needs: ours, and what it is held against.

    python -m tests.bench.commit_speed [--runs 15] [--sizes 1,512] [--folder /dev/shm]

Each run is a fresh QEMU and a fresh overlay; the contestants take turns (A B C D A B C D), so
that a machine whose speed drifts drifts for all. A second monitor hears QEMU's events and their
timestamps. Per contestant, medians of:

* reaction: from ``BLOCK_JOB_READY`` to the job's next status change, on QEMU's own clock;
* job: from the job's creation to ``BLOCK_JOB_COMPLETED``, on QEMU's own clock;
* process: the contestant's whole process, interpreter start included;
* CPU: what that took of a processor, which a busy machine changes least.

The package's modules are compiled before, as an installation compiles them.

The command's start without a job is measured too (``--help``). Nothing here asserts.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MIB = 1 << 20


@dataclass
class Sample:
    """One run, in milliseconds."""

    reaction: float
    job: float
    process: float
    cpu: float


def contestants() -> dict[str, list[str]]:
    """Their command lines; QMP and DISK are added."""
    here = HERE / "contestants"
    command = shutil.which("qmpcommit", path=str(Path(sys.executable).parent)) or "qmpcommit"
    return {
        "bare qemu.qmp": [sys.executable, str(here / "bare_qmp.py")],
        "our library": [sys.executable, str(here / "library.py")],
        "our command": [command, "commit", "--pivot", "--quiet"],
        "bare socket": [sys.executable, str(here / "bare_socket.py")],
    }


class Listener:
    """A second monitor that only listens."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("rwb")
        self.lines.readline()
        self.lines.write(b'{"execute": "qmp_capabilities"}\n')
        self.lines.flush()
        self.lines.readline()

    def until_concluded(self) -> list[tuple[float, str, str]]:
        """(milliseconds, event, status) until the job has ended."""
        heard = []
        for line in self.lines:
            message: dict[str, Any] = json.loads(line)
            if "event" not in message:
                continue
            stamp = message["timestamp"]
            when = stamp["seconds"] * 1e3 + stamp["microseconds"] / 1e3
            status = message.get("data", {}).get("status", "")
            heard.append((when, message["event"], status))
            if status == "concluded":
                break
        return heard

    def close(self) -> None:
        self.lines.close()
        self.sock.close()


def prepare(folder: Path, size: int) -> None:
    """An overlay with `size` MiB of data over an empty base."""

    def run(*command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    room = f"{max(64, size * 2)}M"
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    run(*create, "base.new", room)
    run(*create, "-b", "base.qcow2", "-F", "qcow2", "-u", "top.new", room)
    write = f"write -P 7 0 {size}M"
    shutil.copy(folder / "base.new", folder / "base.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", write, "top.new")


def one_run(folder: Path, command: list[str]) -> Sample:
    """A fresh QEMU, a fresh overlay, one contestant."""
    for layer in ("base", "top"):
        shutil.copy(folder / f"{layer}.new", folder / f"{layer}.qcow2")
    sockets = [folder / "a.sock", folder / "b.sock"]
    for path in sockets:
        path.unlink(missing_ok=True)
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", "-S", "-display", "none", "-nodefaults", "-machine", "q35"]
        + [part for path in sockets for part in ("-qmp", f"unix:{path},server=on,wait=off")]
        + ["-blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2"]
        + ["-device", "virtio-blk-pci,drive=top,id=vda"],
        cwd=folder,
    )
    try:
        _until(lambda: all(path.exists() for path in sockets))
        listener = Listener(sockets[1])
        start, before = time.perf_counter(), _cpu()
        subprocess.run([*command, str(sockets[0]), "top"], check=True, stdout=subprocess.DEVNULL)
        process, cpu = (time.perf_counter() - start) * 1e3, _cpu() - before
        heard = listener.until_concluded()
        listener.close()
    finally:
        qemu.kill()
        qemu.wait()
    created = next(when for when, _, status in heard if status == "created")
    ended = next(when for when, event, _ in heard if event == "BLOCK_JOB_COMPLETED")
    ready = next(i for i, (_, event, _) in enumerate(heard) if event == "BLOCK_JOB_READY")
    reaction = heard[ready + 1][0] - heard[ready][0]
    return Sample(reaction, ended - created, process, cpu)


def _cpu() -> float:
    """Milliseconds of a processor that children have taken that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1e3


def _until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        if time.monotonic() > give_up:
            raise SystemExit("QEMU did not open its monitors")
        time.sleep(0.005)


def measure(folder: Path, size: int, runs: int) -> dict[str, list[Sample]]:
    """All contestants in turn, `runs` times after one warm-up."""
    prepare(folder, size)
    samples: dict[str, list[Sample]] = {name: [] for name in contestants()}
    for number in range(runs + 1):
        for name, command in contestants().items():
            sample = one_run(folder, command)
            if number:
                samples[name].append(sample)
    return samples


def report(size: int, samples: dict[str, list[Sample]]) -> None:
    """A table of medians, with ratios to the bare qemu.qmp script."""

    def median(name: str, what: str) -> float:
        value: float = statistics.median(getattr(sample, what) for sample in samples[name])
        return value

    reference = "bare qemu.qmp"
    print(f"\n{size} MiB overlay, {len(samples[reference])} runs each, medians in ms")
    print(
        f"{'':16}{'reaction':>9} {'ratio':>6}{'job':>10}{'process':>10} {'ratio':>6}"
        f"{'beyond job':>12}{'CPU':>8} {'ratio':>6}"
    )
    for name in samples:
        reaction, job, process, cpu = (
            median(name, what) for what in ("reaction", "job", "process", "cpu")
        )
        print(
            f"{name:16}{reaction:9.2f} {reaction / median(reference, 'reaction'):6.2f}"
            f"{job:10.1f}{process:10.1f} {process / median(reference, 'process'):6.2f}"
            f"{process - job:12.1f}{cpu:8.1f} {cpu / median(reference, 'cpu'):6.2f}"
        )
    ratio = median("our command", "job") / median(reference, "job")
    print(f"QEMU's own job time under our command: {ratio:.3f} times that under {reference}")


def start_up(runs: int) -> None:
    """``qmpcommit --help`` beside an interpreter that imports asyncio."""
    pair = {
        "import asyncio": [sys.executable, "-c", "import asyncio"],
        "--help": [contestants()["our command"][0], "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in pair}
    for number in range(runs + 1):
        for name, command in pair.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    floor, ours = (statistics.median(times[name]) for name in pair)
    print(f"\nqmpcommit --help {ours:.1f} ms, python -c 'import asyncio' {floor:.1f} ms,"
          f" ratio {ours / floor:.2f}")  # fmt: skip


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--sizes", default="1,512", help="overlay data in MiB")
    parser.add_argument("--folder", default="/dev/shm", help="where the images are made")
    options = parser.parse_args()
    version = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    )
    print(version.stdout.splitlines()[0])
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, images in {options.folder}")
    compileall.compile_dir(HERE.parent.parent / "qmpcommit", quiet=1)
    start_up(options.runs)
    for size in (int(text) for text in options.sizes.split(",")):
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="qc-") as folder:
            report(size, measure(Path(folder), size, options.runs))


if __name__ == "__main__":
    main()
