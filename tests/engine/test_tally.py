"""What an engine counts, as `ckptd status` and /metrics show it."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from ckptd.daemon.metrics import EngineCollector
from ckptd.engine.report import report
from ckptd.engine.tally import Tally
from ckptd.model.keys import StepId
from ckptd.pipeline.commit import COMMITTED, Verdict
from ckptd.wire import messages as say
from tests.fakes.engines import Bench

FAILED = Verdict("failed", "SaveFailedError", "step 1: rank 2 failed: no space")
SKIPPED = Verdict("skipped", "SaveSkippedError", "step 2: rank 0 skipped: no slot was free")
UNKNOWN = Verdict("unknown", "SaveUnknownError", "step 3: no answer")


def test_every_verdict_is_counted_once_and_a_skip_does_not_hide_what_failed() -> None:
    tally = Tally()
    for verdict in (FAILED, SKIPPED, SKIPPED, COMMITTED, SKIPPED):
        tally.count(verdict, StepId(1, 2), 5.0)
    assert (tally.committed, tally.failed, tally.skipped, tally.unknown) == (1, 1, 3, 0)
    assert (tally.last_failure, tally.last_skip) == (FAILED.reason, SKIPPED.reason)
    tally.count(UNKNOWN, StepId(1, 3), 6.0)
    assert (tally.unknown, tally.last_failure, tally.skipped) == (1, UNKNOWN.reason, 3)


def test_a_save_that_rank_0_leaves_out_is_counted_and_shown_with_its_reason(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.say(1, say.Forfeit(20, 1, "skipped", "no slot was free"))
    bench.judge(20, SKIPPED)
    found = msgspec.json.decode(report(bench.engine, 0.0))
    assert (found["skipped"], found["failed"], found["committed"]) == (1, 0, 0)
    assert (found["last_skip"], found["last_failure"]) == (SKIPPED.reason, "")
    assert found["jobs"][0]["open"] == []
    registry = CollectorRegistry()
    registry.register(EngineCollector(bench.engine))
    text = generate_latest(registry).decode()
    assert 'ckptd_steps_total{state="skipped"} 1.0' in text
    assert 'ckptd_steps_total{state="failed"} 0.0' in text
