"""What is measured is the call that finds nothing, while somebody listens."""

import pytest
from rich.console import Console

pytest.importorskip("torch")

from bench import preempted
from ckptd.trainer.preempting import Preemption


def test_rows_have_figures_of_calls_that_were_answered_at_once(monkeypatch):
    slow = []
    wait_decided = Preemption._wait_decided
    monkeypatch.setattr(
        Preemption, "_wait_decided", lambda self: slow.append(1) or wait_decided(self)
    )
    ticks = []
    rows = preempted.measure(1000, ticks.append)
    assert len(slow) == 1, "the first call, which is not measured"
    assert len(ticks) == 2
    assert [(row["calls"], row["timed_together"]) for row in rows] == [(10, 1), (1000, 100)]
    assert all(0 < row["median_us"] <= row["p99_us"] for row in rows)
    console = Console(record=True, width=120)
    preempted.show(console, rows)
    assert all(row["case"] in console.export_text(clear=False) for row in rows)
