"""What a fresh overlay will be refused for is known before the base is written to."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import qmpcommit as qc
from qmpcommit.commit.checks import sharing
from qmpcommit.commit.overlay import file as overlay_file
from qmpcommit.commit.overlay.like import Likeness
from qmpcommit.commit.overlay.trial import refused_options
from tests.ground.images import Chain, assert_disk, make_chain
from tests.ground.small_disk import fill, needs_mounts, small_disk
from tests.real.test_fresh_overlay import serving

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"foo": 1}, "Parameter 'foo' is unexpected"),
    ({"detect-zeroes": "unmap"}, "not allowed without setting discard"),
    ({"file": {"aio": "nonsense"}}, "nonsense"),
    ({"file": {"aio": "native"}}, "cache.direct only"),
]


async def refused(
    vm: qc.Session, chain: Chain, kind: type[Exception], told: str, **of: Any
) -> None:
    """Nothing is sent: the base is as it was."""
    before = chain.base.read_bytes()
    with pytest.raises(kind, match=rf"(?s){told}.*Nothing was sent"):
        await vm.commit("top", policy=qc.Recycle(**of))
    assert chain.base.read_bytes() == before
    assert not await vm.execute("query-jobs")


async def test_options_that_qemu_does_not_take_are_refused_before(folder: Path) -> None:
    chain, fresh = make_chain(folder), folder / "fresh"
    async with serving(folder, chain) as vm:
        nodes = (await vm.graph()).nodes.keys()
        for options, told in WRONG:
            of = {"overlay": str(fresh), "overlay_options": options}
            await refused(vm, chain, qc.InvalidRequest, told, **of)
            with pytest.raises(qc.CommitFailed, match=told):
                await vm.discard("top", guest="stop", overlay=fresh, overlay_options=options)
        assert (await vm.graph()).nodes.keys() == nodes
        assert not fresh.exists()
        right = {"discard": "unmap", "detect-zeroes": "unmap", "file": {"locking": "off"}}
        policy = qc.Recycle(str(fresh), overlay_options=right)
        await (await vm.commit("top", policy=policy)).wait()
    assert_disk(fresh, chain.pictures[-1])


async def test_a_node_that_comes_to_be_by_the_trial_is_closed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(folder, make_chain(folder)) as vm:
        execute, nodes = vm.execute, (await vm.graph()).nodes.keys()

        async def changed(command: str, arguments: Any = None) -> Any:
            if command == "blockdev-add":
                arguments = {"driver": "null-co", "node-name": arguments["node-name"]}
            return await execute(command, arguments)

        monkeypatch.setattr(vm, "execute", changed)
        assert await refused_options(vm, Likeness({}, {}, {})) is None
        assert (await vm.graph()).nodes.keys() == nodes


@pytest.mark.parametrize(
    ("name", "told"), [("x" * 256, "more than 255 bytes"), ("fr\udcffsh", "is no UTF-8")]
)
async def test_names_that_no_file_can_have_are_refused_before(
    name: str, told: str, folder: Path
) -> None:
    chain = make_chain(folder)
    async with serving(folder, chain) as vm:
        await refused(vm, chain, qc.InvalidRequest, told, overlay=str(folder / name))
        with pytest.raises(qc.CommitFailed, match=told):
            await vm.discard("top", guest="stop", overlay=folder / name)


@needs_mounts
async def test_a_folder_without_room_is_refused_before(folder: Path) -> None:
    chain = make_chain(folder)
    async with serving(folder, chain) as vm:
        with small_disk(folder / "small", 1 << 20) as small:
            fill(small / "rest")
            await refused(vm, chain, qc.NoSpace, "no room", overlay=str(small / "fresh"))
            assert os.listdir(small) == ["rest"]


@pytest.mark.parametrize("why", [errno.EROFS, errno.EACCES, errno.EOPNOTSUPP])
def test_what_stands_in_the_way_of_this_user_alone_is_no_answer(
    why: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr(os, "open", refuse)
    error = overlay_file.why_not(str(tmp_path / "fresh"))
    assert (error is not None) is (why == errno.EROFS)


async def test_a_window_over_a_file_that_may_not_be_read_opens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(sharing, "image_locks", refuse)
    chain = make_chain(folder)
    async with serving(folder, chain) as vm, vm.snapshot(["top"]) as window:
        assert window["top"].filename == str(chain.top)
    assert_disk(chain.top, chain.pictures[-1])
