"""What dead trainers left: kept for those who come after them, shown, lent, and let go in the end."""

from __future__ import annotations

import msgspec
import pytest

from ckptd.engine import events as ev
from ckptd.engine.events import Effect
from ckptd.engine.memory import KEEP_S
from ckptd.model.keys import StepId
from ckptd.pipeline.commit import Verdict
from ckptd.wire import messages as say
from tests.fakes.engines import ROOT, Bench, handoff, hello, join_with, left_by, of, said, seen

FAILED = Verdict("failed", "SaveFailedError", "because")


def released(effects: list[Effect]) -> list[tuple[int, int]]:
    return [tuple(effect) for effect in of(ev.Release, effects)]


# --- what is kept ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_dead", [True, False])
def test_d6_the_snapshots_of_a_client_that_vanished_are_kept(bench: Bench, is_dead: bool) -> None:
    join_with(bench, 1)
    bench.say(1, handoff(10, 1))
    bench.say(1, handoff(20, 2, slot=1))
    assert not released(bench.on(ev.Gone(1, is_dead)))
    join_with(bench, 2, attempt=2)
    (shown,) = of(ev.ShowHeld, bench.say(2, say.Seek()))
    assert (shown.client, shown.daemon) == (2, bench.engine.memory._daemon)
    assert [arena for arena, _ in shown.snapshots] == [1, 1]
    assert [row for _, row in shown.snapshots] == [
        say.HeldSnapshot(1, "t1", 10, 1, 0, 1, 1, 0, 1),
        say.HeldSnapshot(1, "t1", 20, 2, 0, 1, 1, 1, 1),
    ]


def test_nothing_is_kept_after_a_plain_goodbye(bench: Bench) -> None:
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    assert released(bench.say(1, say.Goodbye())) == [(1, 1)]
    join_with(bench, 2, attempt=2)
    assert seen(bench, 2) == []
    assert bench.engine.clients.keys() == {2}


def test_a_client_that_will_come_again_leaves_its_snapshots(bench: Bench) -> None:
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    assert not released(bench.say(1, say.Goodbye(keeps=True)))
    bench.on(ev.Gone(1, is_dead=False))
    assert bench.engine.memory.kept
    bench.on(ev.Gone(1, is_dead=True))
    join_with(bench, 2, attempt=2)
    assert [row.step for row in seen(bench, 2)] == [10]


def test_a_goodbye_for_good_takes_what_an_earlier_connection_of_the_same_process_left(
    bench: Bench,
) -> None:
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    bench.on(ev.Gone(1, is_dead=False))
    join_with(bench, 2, is_announced=False)  # it came again, and had nothing more to hand off
    assert released(bench.say(2, say.Goodbye())) == [(1, 1)]
    assert bench.engine.clients == {}


def test_p2_a_client_that_handed_nothing_off_leaves_nothing(bench: Bench) -> None:
    join_with(bench, 1)
    join_with(bench, 2, rank=1, is_announced=False)
    assert released(bench.on(ev.Gone(1, is_dead=True))) == [(1, 1)]
    bench.on(ev.Gone(2, is_dead=True))
    assert bench.engine.clients == {}


def test_p2_with_no_time_to_keep_them_arenas_go_at_once() -> None:
    bench = Bench(linger_s=0.0)
    join_with(bench, 1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    bench.store(10, 1)
    assert released(bench.effects) == [(1, 1)], "once it is read"


def test_p2_arenas_go_when_they_were_kept_for_long_enough() -> None:
    bench = Bench(linger_s=300.0)
    join_with(bench, 9, attempt=9, root="/other")  # somebody is here: the daemon stays
    left_by(bench, 1)
    assert bench.engine.memory.next_due() == bench.now + 300.0
    assert bench.engine.next_due() <= bench.now + 300.0
    assert not released(bench.tick(299.0))
    assert released(bench.tick(1.0)) == [(1, 1)]
    assert bench.engine.memory.next_due() is None
    assert bench.engine.clients.keys() == {9}


def test_a_service_keeps_them_for_a_while_too(bench: Bench) -> None:
    left_by(bench, 1)
    assert bench.engine.memory.next_due() == bench.now + KEEP_S


def test_what_is_still_being_stored_is_released_only_after_that(bench: Bench) -> None:
    join_with(bench, 1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    assert not released(bench.tick(KEEP_S))
    assert not bench.engine.memory.kept
    assert released(bench.store(10, 1)) == [(1, 1)]
    assert bench.engine.clients == {}


def test_p2_of_a_rank_only_the_newest_arena_is_kept_however_often_it_dies(bench: Bench) -> None:
    for attempt in range(1, 6):
        left_by(bench, attempt, attempt=attempt)
        left_by(bench, 10 + attempt, attempt=attempt, rank=1, world_size=2)
    assert {owner.number for owner in bench.engine.memory.kept} == {5, 15}
    assert len(released(bench.effects)) == 8


def test_who_was_paused_and_leaves_late_does_not_take_the_place_of_those_after_it(
    bench: Bench,
) -> None:
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    left_by(bench, 2, attempt=2)
    assert released(bench.on(ev.Gone(1, is_dead=True))) == [(1, 1)]
    assert [owner.number for owner in bench.engine.memory.kept] == [2]


def test_a_checkpoint_of_a_newer_attempt_lets_older_snapshots_go(bench: Bench) -> None:
    left_by(bench, 1)
    left_by(bench, 2, rank=1, world_size=2, step=20)
    left_by(bench, 3, root="/other")
    join_with(bench, 4, attempt=2)
    bench.say(4, handoff(30, 1))
    bench.on(ev.ChunksStored(bench.part(30, 1, attempt=2), ()))
    assert not released(bench.on(ev.RankPut(bench.part(30, 1, attempt=2))))
    assert sorted(released(bench.judge(30, attempt=2))) == [(1, 1), (2, 1)]
    assert [owner.hello.root for owner in bench.engine.memory.kept] == ["/other"]


def test_a_step_of_a_newer_attempt_that_failed_lets_nothing_go(bench: Bench) -> None:
    left_by(bench, 1)
    join_with(bench, 2, attempt=2)
    bench.say(2, handoff(30, 1))
    bench.on(ev.PartFailed(bench.part(30, 1, attempt=2), "the disk is full"))
    assert not released(bench.judge(30, FAILED, attempt=2))
    assert [row.step for row in seen(bench, 2)] == [10]


def test_a_checkpoint_of_the_attempt_itself_lets_nothing_go(bench: Bench) -> None:
    """The daemon commits what a dead trainer handed off, and still has it in memory."""
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.on(ev.Gone(1, is_dead=True))
    assert not released(bench.judge(10))
    join_with(bench, 2, attempt=2)
    assert [row.step for row in seen(bench, 2)] == [10]


# --- what is shown -----------------------------------------------------------------------------


def test_only_what_is_left_of_the_same_root_is_shown(bench: Bench) -> None:
    left_by(bench, 1)
    left_by(bench, 2, root="/other", step=20)
    join_with(bench, 3, attempt=2)
    join_with(bench, 4, attempt=2, root="/other")
    assert [row.step for row in seen(bench, 3)] == [10]
    assert [row.step for row in seen(bench, 4)] == [20]


def test_what_somebody_may_still_write_to_is_not_shown(bench: Bench) -> None:
    join_with(bench, 1)
    bench.say(1, handoff(10, 1))
    join_with(bench, 2, rank=1, world_size=2, attempt=2)
    assert seen(bench, 2) == []


def test_of_each_slot_the_last_snapshot_is_shown(bench: Bench) -> None:
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    bench.say(1, msgspec.structs.replace(handoff(30, 3), generation=2))
    bench.on(ev.Gone(1, is_dead=True))
    join_with(bench, 2, attempt=2)
    assert [(row.step, row.slot, row.generation) for row in seen(bench, 2)] == [(30, 0, 2)]


def test_a_larger_arena_takes_the_place_of_what_lay_in_the_smaller_one(bench: Bench) -> None:
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    bench.on(ev.Mapped(1, say.Arena(2, 2, 16384), 999))
    bench.say(1, msgspec.structs.replace(handoff(20, 2), arena=2))
    bench.on(ev.Gone(1, is_dead=True))
    join_with(bench, 2, attempt=2)
    (shown,) = of(ev.ShowHeld, bench.say(2, say.Seek()))
    assert [(arena, row.step) for arena, row in shown.snapshots] == [(2, 20)]


# --- what is lent ------------------------------------------------------------------------------


def test_what_was_shown_is_lent_with_all_that_its_handoff_said(bench: Bench) -> None:
    left_by(bench, 1)
    join_with(bench, 2, attempt=2)
    (row,) = seen(bench, 2)
    (lend,) = of(ev.Lend, bench.say(2, say.Borrow(row.arena, row.slot, row.generation)))
    assert (lend.client, lend.owner) == (2, (1, 1))
    assert isinstance(lend.message, say.Lent)
    assert (lend.message.slots, lend.message.slot_bytes) == (2, 8192)
    assert lend.message.handoff == handoff(10, 1)
    assert lend.message.recipe is not None
    assert seen(bench, 2) == [row], "and it stays for others"


@pytest.mark.parametrize(
    "wish",
    [say.Borrow(1, 0, 2), say.Borrow(1, 1, 1), say.Borrow(7, 0, 1), say.Borrow(3, 0, 1),
     say.Borrow(2, 0, 1), say.Borrow(4, 0, 1)],
    ids=["generation", "slot", "nobody", "other root", "itself", "living"],
)  # fmt: skip
def test_what_is_not_held_is_answered_without_memory(bench: Bench, wish: say.Borrow) -> None:
    left_by(bench, 1)
    left_by(bench, 3, root="/other")
    join_with(bench, 4, rank=1, world_size=2)
    bench.say(4, handoff(10, 1))
    join_with(bench, 2, attempt=2)
    effects = bench.say(2, wish)
    assert not of(ev.Lend, effects)
    assert said(say.Lent, effects, 2) == [say.Lent(wish.arena)]


def test_what_was_let_go_meanwhile_is_answered_without_memory(bench: Bench) -> None:
    left_by(bench, 1)
    join_with(bench, 2, attempt=2)
    (row,) = seen(bench, 2)
    bench.tick(KEEP_S)
    effects = bench.say(2, say.Borrow(row.arena, row.slot, row.generation))
    assert said(say.Lent, effects) == [say.Lent(1)]


# --- who is here, and who is not ---------------------------------------------------------------


def test_s6_a_client_that_was_told_to_go_is_not_heard_any_more(bench: Bench) -> None:
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    bench.say(1, handoff(20, 2, slot=9))  # makes no sense
    effects = bench.say(1, handoff(30, 3, slot=1))
    assert not of(ev.Store, effects)
    effects = bench.on(ev.Mapped(1, say.Arena(2, 2, 8192), 999))
    assert released(effects) == [(1, 2)], "its memory is nobody's"
    join_with(bench, 2, attempt=2)
    assert [row.step for row in seen(bench, 2)] == [10]


def test_p2_memory_that_comes_before_a_hello_is_let_go(bench: Bench) -> None:
    effects = bench.on(ev.Mapped(1, say.Arena(1, 2, 8192), 999))
    assert said(say.Refused, effects)
    assert released(effects) == [(1, 1)]


def test_a_rank_that_is_gone_is_not_taken_for_one_that_delivers_here(bench: Bench) -> None:
    """It may have another daemon by now: the store is looked at, as if it were elsewhere."""
    join_with(bench, 1, rank=0, world_size=2)
    join_with(bench, 2, rank=1, world_size=2)
    bench.write(2, 10, 1, rank=1)
    bench.write(1, 10, 1, rank=0)
    bench.judge(10)
    bench.on(ev.Gone(2, is_dead=False))
    assert bench.engine.memory.kept
    assert of(ev.Try, bench.write(1, 20, 2, rank=0))


def test_d9_what_an_earlier_job_of_that_name_left_is_shown_with_its_own_token(bench: Bench) -> None:
    left_by(bench, 1)
    mine = msgspec.structs.replace(hello(), token="anew")
    bench.say(2, mine)
    bench.on(ev.Opened(2))
    assert [(row.attempt, row.token) for row in seen(bench, 2)] == [(1, "t1")]


# --- handoffs ----------------------------------------------------------------------------------


def test_each_handoff_is_acknowledged_before_it_is_stored(bench: Bench) -> None:
    join_with(bench, 1)
    effects = bench.say(1, handoff(10, 1))
    assert said(say.Taken, effects, 1) == [say.Taken(10, 1)]
    bench.store(10, 1)
    bench.put(10, 1)
    bench.judge(10)
    join_with(bench, 2)
    assert said(say.Taken, bench.say(2, handoff(10, 1)), 2) == [say.Taken(10, 1)], "also a late one"


def test_s6_a_basis_that_is_no_step_ends_the_connection_and_is_not_kept(bench: Bench) -> None:
    join_with(bench, 1)
    effects = bench.say(1, msgspec.structs.replace(handoff(10, 1), basis="../../etc"))
    (refusal,) = said(say.Refused, effects)
    assert refusal.kind == "ProtocolError"
    assert not of(ev.Store, effects)
    assert not said(say.Taken, effects)
    assert released(effects) == [(1, 1)]
    assert bench.engine.clients == {}


def based(step: int, sequence: int) -> say.Handoff:
    plain = handoff(step, sequence, slot=sequence % 2, previous=str(StepId(1, 5)))
    return msgspec.structs.replace(plain, basis=str(StepId(1, 8)))


def test_r1_rank_0_names_what_it_took_from_memory_until_its_attempt_has_a_checkpoint(
    bench: Bench,
) -> None:
    join_with(bench, 1, attempt=2)
    for step, sequence in ((10, 1), (20, 2), (30, 3)):
        bench.say(1, based(step, sequence))
        (put,) = of(ev.PutRank, bench.on(ev.ChunksStored(bench.part(step, sequence, 0, 2), ())))
        is_first_commit = step < 30
        assert put.basis == (StepId(1, 8) if is_first_commit else None)
        assert put.record.previous == str(StepId(1, 5) if is_first_commit else StepId(2, 20))
        bench.on(ev.RankPut(put.part))
        bench.judge(step, FAILED if step == 10 else Verdict("committed"), attempt=2)


def test_other_ranks_name_no_basis(bench: Bench) -> None:
    join_with(bench, 1, rank=1, world_size=2, attempt=2)
    bench.say(1, based(10, 1))
    (put,) = of(ev.PutRank, bench.on(ev.ChunksStored(bench.part(10, 1, 1, 2), ())))
    assert put.basis is None


# --- a word to stop ----------------------------------------------------------------------------


@pytest.mark.parametrize(("root", "told"), [("", {1, 2, 3}), (ROOT, {1, 2}), ("/nowhere", set())])
def test_a_word_to_stop_reaches_the_trainers_of_a_root_or_of_all(
    bench: Bench, root: str, told: set[int]
) -> None:
    join_with(bench, 1, rank=0, world_size=3)
    join_with(bench, 2, rank=1, world_size=3)
    join_with(bench, 3, root="/other")
    left_by(bench, 4, rank=2, world_size=3)
    effects = bench.say(9, say.Preempt(root, "the node goes"))
    stops = [e for e in of(ev.Send, effects) if isinstance(e.message, say.Stop)]
    assert {stop.client for stop in stops} == told
    assert {stop.message.reason for stop in stops} <= {"the node goes"}
    assert said(say.Told, effects, 9) == [say.Told(len(told))]
    assert 9 not in bench.engine.clients, "whoever says so need not be a trainer"
