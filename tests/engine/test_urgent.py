"""Snapshots with a deadline: they wait for no other, and the line stays whole all the same."""

from __future__ import annotations

import msgspec

from ckptd.engine import events as ev
from ckptd.engine.events import Effect
from ckptd.model.keys import StepId
from ckptd.wire import messages as say
from tests.fakes.engines import Bench, handoff, of, said


def urgent(step: int, sequence: int, *, previous: str | None = None) -> say.Handoff:
    plain = handoff(step, sequence, slot=sequence % 2, previous=previous)
    return msgspec.structs.replace(plain, deadline_s=25.0)


def previous_of(effects: list[Effect]) -> str | None:
    (put,) = of(ev.PutRank, effects)
    return put.record.previous


def test_a_snapshot_with_a_deadline_is_stored_as_urgent(bench: Bench) -> None:
    bench.join(1)
    assert not of(ev.Store, bench.say(1, handoff(10, 1)))[0].is_urgent
    effects = bench.say(1, urgent(20, 2))
    assert of(ev.Store, effects)[0].is_urgent
    assert said(say.Taken, effects) == [say.Taken(20, 2)]


def test_an_urgent_step_is_committed_before_earlier_ones_that_are_still_being_stored(
    bench: Bench,
) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    bench.say(1, urgent(20, 2))
    assert of(ev.PutRank, bench.store(20, 2))
    assert of(ev.Try, bench.put(20, 2))
    assert said(say.Finished, bench.judge(20))[0].step == 20
    bench.store(10, 1)
    bench.put(10, 1)
    assert said(say.Finished, bench.judge(10))[0].state == "committed"


def test_r1_no_step_names_one_as_before_it_that_comes_after_it(bench: Bench) -> None:
    resumed, first = str(StepId(0, 7)), str(StepId(1, 10))
    bench.join(1)
    bench.write(1, 10, 1)
    bench.judge(10)
    bench.say(1, handoff(20, 2, previous=first))
    bench.say(1, urgent(30, 3, previous=first))
    assert previous_of(bench.store(30, 3)) == first
    bench.put(30, 3)
    bench.judge(30)
    assert previous_of(bench.store(20, 2)) == first
    bench.put(20, 2)
    bench.judge(20)
    bench.say(1, handoff(40, 4))
    assert previous_of(bench.store(40, 4)) == str(StepId(1, 30)), "the newest"
    other = Bench()
    other.join(1)
    other.say(1, handoff(10, 1, previous=resumed))
    other.say(1, urgent(20, 2, previous=resumed))
    other.store(20, 2)
    other.put(20, 2)
    other.judge(20)
    assert previous_of(other.store(10, 1)) == resumed, "the lowest step leads to what was resumed"


def test_a_step_after_an_urgent_one_waits_for_all_before_it(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    bench.say(1, urgent(20, 2))
    bench.say(1, handoff(30, 3))
    assert not of(ev.PutRank, bench.store(30, 3))
    bench.store(20, 2)
    bench.put(20, 2)
    assert not of(ev.PutRank, bench.judge(20)), "the first is still open"
    bench.store(10, 1)
    bench.put(10, 1)
    assert previous_of(bench.judge(10)) == str(StepId(1, 20))


# --- while a daemon is told to go ----------------------------------------------------------------


def test_p6_a_daemon_that_drains_takes_the_last_snapshots_of_its_clients(bench: Bench) -> None:
    bench.join(1)
    assert not of(ev.Exit, bench.on(ev.StopAsked(bench.now + 30))), "a client is here"
    bench.write(1, 10, 1)
    assert not of(ev.Exit, bench.judge(10))
    assert of(ev.Store, bench.say(1, urgent(20, 2)))
    bench.store(20, 2)
    bench.put(20, 2)
    assert not of(ev.Exit, bench.judge(20))
    assert of(ev.Exit, bench.say(1, say.Goodbye())) == [ev.Exit(0)]


def test_p6_a_daemon_that_drains_finishes_what_a_client_left_and_then_goes(bench: Bench) -> None:
    bench.join(1)
    bench.on(ev.StopAsked(bench.now + 30))
    bench.say(1, urgent(10, 1))
    assert not of(ev.Exit, bench.on(ev.Gone(1, is_dead=True)))
    bench.store(10, 1)
    bench.put(10, 1)
    assert of(ev.Exit, bench.judge(10)) == [ev.Exit(0)]


def test_p6_a_daemon_without_clients_and_work_goes_at_once(bench: Bench) -> None:
    assert of(ev.Exit, bench.on(ev.StopAsked(bench.now + 30))) == [ev.Exit(0)]


def test_p6_at_its_deadline_a_daemon_goes_whoever_is_there_and_says_what_is_left() -> None:
    idle, busy = Bench(), Bench()
    for bench in (idle, busy):
        bench.join(1)
    busy.say(1, urgent(10, 1))
    for bench, code in ((idle, 0), (busy, 6)):
        bench.on(ev.StopAsked(bench.now + 30))
        assert bench.engine.next_due() == bench.now + 30
        assert not of(ev.Exit, bench.tick(29))
        assert of(ev.Exit, bench.tick(1)) == [ev.Exit(code)]


def test_r1_the_lowest_step_leads_to_what_came_from_memory_also_after_an_urgent_one(
    bench: Bench,
) -> None:
    basis, resumed = str(StepId(0, 9)), str(StepId(0, 7))
    bench.join(1)
    first = handoff(10, 1, previous=resumed)
    bench.say(1, msgspec.structs.replace(first, basis=basis))
    bench.say(1, msgspec.structs.replace(urgent(20, 2, previous=resumed), basis=basis))
    for step in (20, 10):
        (put,) = of(ev.PutRank, bench.store(step, step // 10))
        assert (str(put.basis), put.record.previous) == (basis, resumed)
        bench.put(step, step // 10)
        bench.judge(step)
