"""What is warned of a window's overlay, and that it is once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from qmpcommit.daemon.config import Limits
from qmpcommit.daemon.window_watch import LATE, Seen, Watch

FRESH = Seen("web1", "20260101T000000Z-1f2e3d4c", "vda", "/vms/vda.qmpcommit-window.qcow2", 1.0, -5)


@pytest.mark.parametrize(
    ("seen", "size", "warning"),
    [
        (FRESH, 1, None),
        (FRESH._replace(late=LATE), 1, None),
        (FRESH._replace(late=LATE + 1), 1, "window_outlived_its_lease"),
        (FRESH._replace(age=3601.0), 1, "window_old"),
        (FRESH, 4097, "window_large"),
    ],
)
def test_it_is_told_with_its_age_and_size(seen: Seen, size: int, warning: str | None) -> None:
    limits = Limits(window_age="1h", window_size="4K")  # type: ignore[arg-type]
    engine: Any = SimpleNamespace(config=SimpleNamespace(limits=limits))
    watch, said = Watch(engine, {}), list[tuple[str, dict[str, Any]]]()

    def warn(event: str, **facts: Any) -> None:
        said.append((event, facts))

    watch._log = SimpleNamespace(warning=warn)  # type: ignore[assignment]
    for _ in range(2):
        watch._warn(seen, size)
    assert [event for event, _ in said] == ([warning] if warning else [])
    for _, facts in said:
        assert (facts["vm"], facts["disk"], facts["overlay"]) == ("web1", "vda", seen.path)


async def test_a_bug_in_a_look_ends_nothing() -> None:
    async def windows() -> list[Any]:
        raise RuntimeError("of ours")

    engine: Any = SimpleNamespace(registry=SimpleNamespace(vms={}))
    vm: Any = SimpleNamespace(name="web1", session=SimpleNamespace(windows=windows))
    watch, said = Watch(engine, {}), list[str]()
    watch._log = SimpleNamespace(warning=lambda event, **_: said.append(event))  # type: ignore[assignment]
    await watch.look_at(vm)
    assert said == ["bug"]
