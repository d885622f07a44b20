"""What a step pays for asking whether it has to stop, when nothing has happened."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ckptd
from bench.stats import quantile

GOAL_US = 5.0
"""What a call may take, median."""

_BATCH = 100
_numbers = itertools.count(1)

Row = dict[str, Any]


def measure(calls: int, tick: Callable[[str], None]) -> list[Row]:
    """Return a row for calls between steps of training, and one for calls in a tight loop.

    Each call between steps is timed by itself, and the clock's own time is in it; in the loop,
    batches are timed. The thread that listens is running.
    """
    url = f"memory://bench-preempted-{next(_numbers)}"
    with ckptd.Checkpointer(url, daemon=False, slots=1) as ckpt:
        ckpt.preempted()  # the first call begins to listen
        tick("preempted(): between steps")
        steps = _between_steps(ckpt, max(1, calls // 100))
        tick("preempted(): in a loop")
        loop = _in_a_loop(ckpt, calls)
    return [_row("between steps", steps, 1), _row("in a loop", loop, _BATCH)]


def _between_steps(ckpt: ckptd.Checkpointer, calls: int) -> list[float]:
    """Time single calls that find other things in the processor's caches."""
    weight, batch = torch.randn(256, 256), torch.randn(64, 256)
    spans = []
    for _ in range(calls):
        torch.tanh(batch @ weight)
        began = time.perf_counter_ns()
        ckpt.preempted()
        spans.append((time.perf_counter_ns() - began) / 1e3)
    return spans


def _in_a_loop(ckpt: ckptd.Checkpointer, calls: int) -> list[float]:
    spans = []
    for _ in range(max(1, calls // _BATCH)):
        began = time.perf_counter_ns()
        for _ in range(_BATCH):
            ckpt.preempted()
        spans.append((time.perf_counter_ns() - began) / 1e3 / _BATCH)
    return spans


def _row(case: str, spans: list[float], batch: int) -> Row:
    return {
        "case": case, "calls": len(spans) * batch, "timed_together": batch,
        "median_us": quantile(spans, 0.5), "p99_us": quantile(spans, 0.99),
        "goal_us": GOAL_US,
    }  # fmt: skip


def show(console: Console, rows: list[Row]) -> None:
    """Print the rows."""
    table = Table(title="preempted(), when nothing has happened", title_justify="left")
    for name in ("calls", "number", "timed together", "median", "99 of 100 below", "goal, median"):
        table.add_column(name, justify="left" if name == "calls" else "right")
    for row in rows:
        table.add_row(
            row["case"], f"{row['calls']:,}", str(row["timed_together"]),
            f"{row['median_us']:.2f} µs", f"{row['p99_us']:.2f} µs", f"{row['goal_us']:g} µs",
        )  # fmt: skip
    console.print(table)
