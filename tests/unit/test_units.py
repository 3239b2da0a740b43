from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpcommit import InvalidRequest
from qmpcommit.units import parse_seconds, parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("512K", 512 << 10),
        ("50MiB", 50 << 20),
        ("50 MB/s", 50 << 20),
        ("1.5G", 3 << 29),
        ("2tib", 2 << 40),
        ("7B", 7),
        (123, 123),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1X", "1 2", "١M", "1e3", "inf", -1, 2**63, "9E", "0x10", True, 1.5]
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(InvalidRequest):
        parse_size(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 30), ("1.5", 1.5), ("500ms", 0.5), ("2min", 120), ("1h", 3600), (0, 0), (2.5, 2.5)],
)
def test_times(text: str | float, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1d", "nan", "inf", "1e9", -1, float("nan"), float("inf"), True, None]
)
def test_what_is_no_time(text: object) -> None:
    with pytest.raises(InvalidRequest):
        parse_seconds(text)  # type: ignore[arg-type]


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_clear_error(text: str) -> None:
    try:
        assert 0 <= parse_size(text) < 2**63
    except InvalidRequest as error:
        assert error.message


@given(st.text(max_size=20))
def test_any_text_is_a_time_or_a_clear_error(text: str) -> None:
    try:
        assert parse_seconds(text) >= 0
    except InvalidRequest as error:
        assert error.message


def test_sizes_for_people() -> None:
    shown = [show_size(n) for n in (None, 0, 1023, 1 << 20, 3 << 29, 200 << 30, 5 << 50)]
    assert shown == ["?", "0 B", "1023 B", "1 MiB", "1.5 GiB", "200 GiB", "5120 TiB"]
