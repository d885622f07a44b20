from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.units import KIB, MIB, format_bytes, format_span


def test_the_units_are_binary() -> None:
    assert (KIB, MIB) == (1024, 1024**2)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1, "1 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"),
        (MIB, "1.0 MiB"), (32 * MIB, "32.0 MiB"), (1536 * MIB, "1.5 GiB"),
        (1 << 40, "1.0 TiB"), (1 << 50, "1.0 PiB"), (1 << 63, "8192.0 PiB"), (-1536, "-1.5 KiB"),
    ],
)  # fmt: skip
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 us"), (4.2e-5, "42 us"), (0.0042, "4.2 ms"), (0.999, "999.0 ms"), (1.0, "1.0 s"),
        (9.96, "10.0 s"), (27.0, "27 s"), (119.4, "119 s"), (120.0, "2 min"), (7199.0, "120 min"), (7200.0, "2.0 h"),
        (48 * 3600.0, "2.0 d"), (365 * 86400.0, "365.0 d"),
    ],
)  # fmt: skip
def test_spans_for_people(seconds: float, text: str) -> None:
    assert format_span(seconds) == text


@given(st.integers(-(1 << 70), 1 << 70))
def test_any_number_of_bytes_is_short(count: int) -> None:
    assert len(format_bytes(count)) <= 20


@given(st.floats(0, 1e12))
def test_any_span_is_short(seconds: float) -> None:
    assert len(format_span(seconds)) <= 20
