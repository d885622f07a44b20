"""Ranks that do not mean the same save: nothing is mixed, and nobody is told that it was stored."""

from __future__ import annotations

import msgspec
import pytest

from ckptd.engine import events as ev
from ckptd.pipeline.commit import COMMITTED, Verdict
from ckptd.wire import messages as say
from tests.fakes.engines import ROOT, Bench, handoff, hello, of, said

FAILED = Verdict("failed", "SaveFailedError", "because")
SECOND_SAVES = [handoff(10, 2), say.Watch(10, 2, None), say.Forfeit(10, 2, "skipped", "no slot")]


def test_d9_two_steps_under_one_sequence_number_doom_each_other(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.say(1, handoff(10, 1))
    ends = of(ev.End, bench.say(2, handoff(11, 1)))
    assert {end.step.id.step for end in ends} == {10, 11}
    assert all("save 1 was step" in end.verdict.reason for end in ends)


def test_d9_one_step_twice_from_one_rank_is_refused(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    (end,) = of(ev.End, bench.say(1, handoff(10, 2, slot=1)))
    assert "twice" in end.verdict.reason


def test_d9_one_save_twice_on_one_connection_is_refused(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    (end,) = of(ev.End, bench.say(1, handoff(10, 1, slot=1)))
    assert "twice" in end.verdict.reason


@pytest.mark.parametrize("message", SECOND_SAVES, ids=["handoff", "watch", "forfeit"])
def test_d9_two_saves_of_one_open_step_doom_it(bench: Bench, message: say.FromTrainer) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.say(1, handoff(10, 1))
    effects = bench.say(2, message)
    assert not of(ev.Store, effects), "it can never be committed"
    (step,) = bench.engine.jobs[ROOT, 1].steps.values()
    assert set(step.parts) == {0}, "what belongs to another save is no part of this one"
    (end,) = of(ev.End, effects)
    assert end.verdict.kind == "SaveFailedError"
    assert "step 10 is save 1 on one rank and 2 on another" in end.verdict.reason
    effects = bench.judge(10, end.verdict)
    (one,) = said(say.Finished, effects, 1)
    (two,) = said(say.Finished, effects, 2)
    assert (one.sequence, one.state) == (1, "failed")
    assert (two.sequence, two.state) == (2, "failed")


def test_d9_a_second_save_of_a_step_that_was_just_committed_is_not_called_committed(
    bench: Bench,
) -> None:
    bench.join(1)
    bench.write(1, 10, 1)
    bench.join(2)
    bench.say(2, handoff(10, 2))
    effects = bench.judge(10)  # the commit was on its way
    (finished,) = said(say.Finished, effects, 2)
    assert (finished.sequence, finished.state) == (2, "failed")
    assert bench.engine.tally.committed == 1


@pytest.mark.parametrize("verdict", [COMMITTED, FAILED], ids=["committed", "failed"])
@pytest.mark.parametrize("message", SECOND_SAVES, ids=["handoff", "watch", "forfeit"])
def test_d9_a_second_save_of_a_closed_step_fails_whatever_became_of_the_first(
    bench: Bench, message: say.FromTrainer, verdict: Verdict
) -> None:
    bench.join(1)
    bench.write(1, 10, 1)
    bench.judge(10, verdict)
    effects = bench.say(1, message)
    (finished,) = said(say.Finished, effects)
    assert (finished.sequence, finished.state) == (2, "failed")
    assert finished.kind == "SaveFailedError"
    assert "save 1 on one rank and 2 on another" in finished.reason
    assert not said(say.Written, effects), "nobody stored it"
    (finished,) = said(say.Finished, bench.say(1, say.Watch(10, 1, None)))
    assert finished.state == verdict.state, "the first save is remembered as it was"


def test_p5_a_root_begun_anew_takes_the_attempt_of_a_job_that_has_gone(bench: Bench) -> None:
    bench.join(1)
    bench.write(1, 10, 1)
    other = msgspec.structs.replace(hello(), token="of the new root")
    refusals = said(say.Refused, bench.say(2, other))
    assert [r.kind for r in refusals] == ["DaemonUnavailableError"], "the first job is still here"
    bench.on(ev.Gone(1, is_dead=True))
    assert said(say.Refused, bench.say(3, other)), "its step is still being decided"
    bench.judge(10)
    assert of(ev.Open, bench.say(4, other))
