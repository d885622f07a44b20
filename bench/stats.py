"""Medians and intervals of few samples, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """The median of samples, and the interval that holds the middle of them."""

    median: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float]:
        """Return the fields by name, for JSON."""
        return self._asdict()


def quantile(samples: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the samples lie, between two of them linearly."""
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def spread(samples: Sequence[float], share: float = 0.8) -> Spread | None:
    """Return median and central interval; `share` 1 is from least to most. None without samples."""
    if not samples:
        return None
    edge = (1 - share) / 2
    return Spread(
        quantile(samples, 0.5), quantile(samples, edge), quantile(samples, 1 - edge), len(samples)
    )


def median(samples: Sequence[float]) -> float | None:
    """Return the median, None without samples."""
    return quantile(samples, 0.5) if samples else None


def overhead_s(plain_s: Sequence[float], span_s: float, steps: int) -> float:
    """Return what a save cost in all: the span from its call on, less its steps at plain speed.

    Args:
        plain_s: steps without a save, from right before the span and right after it.
        span_s: the call of save and the `steps` training steps that follow it.
        steps: how many.
    """
    return span_s - steps * quantile(plain_s, 0.5)


def parse_size(text: str) -> int:
    """Return the bytes that `500M`, `1.5G` or `64MiB` names (decimal units unless `i`).

    Raises:
        ValueError: it is no size.
    """
    body = text.strip().upper().removesuffix("B")
    base = 1000
    if body.endswith("I"):
        body, base = body[:-1], 1024
    power = "KMGT".find(body[-1:]) + 1 if body[-1:] else 0
    size = float(body[:-1] if power else body) * base**power
    if not 0 < size < 1e15:
        raise ValueError(f"{text!r} is no size of a state")
    return int(size)


def ratio(value: float | None, base: float | None) -> str:
    """Write `value` as a multiple of `base`; what is not above zero drowned in noise."""
    if value is None or base is None:
        return "-"
    if value <= 0 or base <= 0:
        return "noise"
    return f"{value / base:.2f}x"


def seconds(value: float | None) -> str:
    """Write seconds in three digits."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if abs(value) < 1 else f"{value:.2f} s"


def with_range(found: Spread | None, write: Any = seconds) -> str:
    """Write a median and its interval."""
    if found is None:
        return "-"
    if found.count == 1:
        return write(found.median)
    return f"{write(found.median)} ({_short(found.low, write)}..{_short(found.high, write)})"


def _short(value: float, write: Any) -> str:
    return write(value).removesuffix(" ms").removesuffix(" s") if abs(value) < 1 else write(value)
