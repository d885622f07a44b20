"""Connections that end and come again, while the daemon lives."""

from __future__ import annotations

import pytest

from ckptd.engine import events as ev
from ckptd.model.keys import MAX_STEP
from ckptd.wire import messages as say
from tests.fakes.engines import Bench, handoff, hello, of, said


def test_d6_a_snapshot_handed_off_again_after_a_lost_connection_is_the_same_one(
    bench: Bench,
) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=False))
    bench.join(2)
    effects = bench.say(2, handoff(10, 1))
    assert not of(ev.Store, effects), "it is being stored already"
    assert not of(ev.End, effects)
    bench.store(10, 1)
    assert said(say.Written, bench.put(10, 1), client=2)
    assert said(say.Finished, bench.judge(10), client=2)[0].state == "committed"


def test_d6_a_part_that_is_written_already_is_answered_at_once(bench: Bench) -> None:
    bench.join(1, world_size=2)
    bench.write(1, 10, 1)
    bench.join(2, world_size=2)
    assert said(say.Written, bench.say(2, handoff(10, 1)), client=2)


def test_d9_another_save_of_the_step_on_a_new_connection_is_refused(bench: Bench) -> None:
    bench.join(1)
    bench.say(1, handoff(10, 1))
    bench.join(2)
    (end,) = of(ev.End, bench.say(2, handoff(10, 2)))
    assert "twice" in end.verdict.reason


def test_a_watch_of_a_step_that_is_closed_is_answered_from_memory(bench: Bench) -> None:
    bench.join(1)
    bench.write(1, 10, 1)
    bench.judge(10)
    bench.join(2)
    effects = bench.say(2, say.Watch(10, 1, None))
    assert said(say.Finished, effects)[0].state == "committed"
    assert bench.engine.tally.committed == 1


def test_a_watched_step_is_asked_for_although_another_local_rank_never_asks(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    assert of(ev.Poll, bench.say(2, say.Watch(10, 1, None)))


def test_s6_memory_of_a_client_that_breaks_the_protocol_is_released(bench: Bench) -> None:
    bench.join(1)
    effects = bench.say(1, handoff(MAX_STEP + 1, 1))
    assert of(ev.Drop, effects)
    assert of(ev.Release, effects)
    assert bench.engine.clients == {}


@pytest.mark.parametrize(
    "message",
    [say.Watch(MAX_STEP + 1, 1, None), say.Forfeit(MAX_STEP + 1, 1, "failed", ""), hello()],
    ids=["watch", "forfeit", "hello"],
)
def test_s6_a_message_that_makes_no_sense_ends_its_connection(
    bench: Bench, message: say.FromTrainer
) -> None:
    bench.join(1)
    assert of(ev.Drop, bench.say(1, message))
    assert bench.engine.clients == {}


def test_p6_a_daemon_that_drains_takes_the_last_snapshot_of_who_is_here_and_no_other_job(
    bench: Bench,
) -> None:
    """Who tells a daemon to go tells trainers too, whose last snapshot comes after that."""
    bench.join(1)
    bench.write(1, 10, 1)
    bench.judge(10)
    assert not of(ev.Exit, bench.on(ev.StopAsked(bench.now + 30)))
    (refusal,) = said(say.Refused, bench.say(2, hello(attempt=2)))
    assert (refusal.kind, refusal.reason) == ("DaemonUnavailableError", "the daemon is stopping")
    (refusal,) = said(say.Refused, bench.say(3, hello(root="/other")))
    assert refusal.kind == "DaemonUnavailableError"
    assert of(ev.Store, bench.say(1, handoff(20, 2, slot=1)))
    bench.on(ev.Gone(1, is_dead=False))
    bench.join(4)  # it comes again, with what it has handed off
    assert not said(say.Refused, bench.say(4, handoff(20, 2, slot=1)))
    bench.store(20, 2)
    bench.put(20, 2)
    assert not of(ev.Exit, bench.judge(20)), "it may have another one"
    assert of(ev.Exit, bench.say(4, say.Goodbye())) == [ev.Exit(0)]


def test_a_step_without_anything_due_asks_for_no_tick_before_its_timeout(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.say(1, handoff(10, 1))
    assert bench.engine.next_due() == bench.now + 60.0
    bench.store(10, 1)
    bench.put(10, 1)
    assert bench.engine.next_due() == bench.now + 60.0


def test_k1_a_process_that_is_dead_only_after_its_socket_was_closed_is_mourned(
    bench: Bench,
) -> None:
    bench.join(1, rank=0, world_size=2)
    bench.join(2, rank=1, world_size=2)
    bench.say(1, handoff(10, 1))
    assert not of(ev.End, bench.on(ev.Gone(2, is_dead=False)))
    (end,) = of(ev.End, bench.on(ev.Gone(2, is_dead=True)))
    assert end.outcomes[0].rank == 1


def test_a_death_of_a_process_that_had_said_goodbye_or_came_back_ends_nothing(bench: Bench) -> None:
    bench.join(1, rank=0, world_size=3)
    bench.join(2, rank=1, world_size=3)
    bench.join(3, rank=2, world_size=3)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(2, is_dead=False))
    bench.join(4, rank=1, world_size=3)
    assert not of(ev.End, bench.on(ev.Gone(2, is_dead=True)))
    bench.say(3, say.Goodbye())
    assert not of(ev.End, bench.on(ev.Gone(3, is_dead=True)))
