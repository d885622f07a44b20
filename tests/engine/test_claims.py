"""Arenas of dead trainers that are given to new ones: never to two, never from the living."""

from __future__ import annotations

import pytest

from ckptd.engine import events as ev
from ckptd.engine.events import Effect
from ckptd.engine.memory import KEEP_S
from ckptd.wire import messages as say
from tests.fakes.engines import Bench, announce, handoff, join_with, left_by, of, said, seen

WISH = say.Claim(1, 8192)


def claim(bench: Bench, client: int, wish: say.Claim = WISH) -> int | str | None:
    """Claim; return whose arena was ceded, None for none, or "later"."""
    return answer(bench.say(client, wish), client)


def answer(effects: list[Effect], client: int) -> int | str | None:
    lends = [lend for lend in of(ev.Lend, effects) if lend.client == client]
    if lends:
        (lend,) = lends
        assert isinstance(lend.message, say.Ceded)
        assert lend.message.slots > 0
        assert lend.owner[1] == 1
        return lend.owner[0]
    if said(say.Ceded, effects, client):
        assert said(say.Ceded, effects, client) == [say.Ceded()]
        return None
    return "later"


def newcomer(bench: Bench, client: int, rank: int = 0, attempt: int = 2) -> None:
    join_with(bench, client, rank=rank, world_size=8, attempt=attempt, is_announced=False)


def test_p3_an_arena_of_a_dead_trainer_is_ceded_with_its_shape(bench: Bench) -> None:
    left_by(bench, 1)
    newcomer(bench, 2)
    (lend,) = of(ev.Lend, bench.say(2, WISH))
    assert lend == ev.Lend(2, say.Ceded(2, 8192), (1, 1))


def test_d2_nothing_is_ceded_as_long_as_its_writer_may_live(bench: Bench) -> None:
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    newcomer(bench, 2)
    assert claim(bench, 2) is None, "it is connected"
    bench.on(ev.Gone(1, is_dead=False))
    assert claim(bench, 2) is None, "its connection has ended, and no more is known"
    bench.on(ev.Gone(1, is_dead=True))
    assert claim(bench, 2) == 1


def test_nothing_is_ceded_to_another_root(bench: Bench) -> None:
    left_by(bench, 1, root="/other")
    newcomer(bench, 2)
    assert claim(bench, 2) is None
    assert bench.engine.memory.kept


@pytest.mark.parametrize(
    ("wish", "is_ceded"),
    [(say.Claim(2, 8192), True), (say.Claim(1, 4096), True), (say.Claim(3, 8192), False),
     (say.Claim(1, 12288), False)],
)  # fmt: skip
def test_an_arena_has_to_be_as_large_as_was_asked_for(
    bench: Bench, wish: say.Claim, is_ceded: bool
) -> None:
    left_by(bench, 1)
    newcomer(bench, 2)
    assert claim(bench, 2, wish) == (1 if is_ceded else None)


def test_the_arena_of_the_same_rank_goes_first_then_the_largest(bench: Bench) -> None:
    left_by(bench, 1, rank=1, world_size=8, slot_bytes=8192)
    left_by(bench, 2, rank=2, world_size=8, slot_bytes=16384)
    left_by(bench, 3, rank=3, world_size=8, slot_bytes=12288)
    for client, rank in ((11, 3), (12, 5), (13, 7)):
        newcomer(bench, client, rank)
    assert [claim(bench, client) for client in (11, 12, 13)] == [3, 2, 1]


def test_d2_several_claimants_never_get_one_arena(bench: Bench) -> None:
    left_by(bench, 1)
    left_by(bench, 2, rank=1, world_size=8)
    for rank in range(4):
        newcomer(bench, 10 + rank, rank)
    assert [claim(bench, 10 + rank) for rank in range(4)] == [1, 2, None, None]
    assert claim(bench, 13) is None


@pytest.mark.parametrize("is_good", [True, False])
def test_d2_an_arena_that_is_still_being_stored_is_waited_for(bench: Bench, is_good: bool) -> None:
    join_with(bench, 1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    newcomer(bench, 2)
    assert claim(bench, 2) == "later"
    assert answer(bench.tick(60.0), 2) == "later"
    part = bench.part(10, 1)
    event = ev.ChunksStored(part, ()) if is_good else ev.PartFailed(part, "the disk is full")
    assert answer(bench.on(event), 2) == 1
    assert answer(bench.tick(), 2) == "later", "it is answered once"


def test_an_arena_that_is_free_is_not_waited_for(bench: Bench) -> None:
    join_with(bench, 1, world_size=8)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    left_by(bench, 2, rank=1, world_size=8)
    newcomer(bench, 3)
    assert claim(bench, 3) == 2


def test_who_waits_and_leaves_is_given_nothing(bench: Bench) -> None:
    join_with(bench, 1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    newcomer(bench, 2)
    assert claim(bench, 2) == "later"
    bench.on(ev.Gone(2, is_dead=False))
    assert not of(ev.Lend, bench.store(10, 1))


def test_an_arena_that_is_waited_for_may_go_for_its_age(bench: Bench) -> None:
    join_with(bench, 1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    newcomer(bench, 2)
    assert claim(bench, 2) == "later"
    assert answer(bench.tick(KEEP_S), 2) is None


# --- claimants that go -------------------------------------------------------------------------


def test_a_claimant_that_dies_before_it_announced_the_arena_frees_it(bench: Bench) -> None:
    left_by(bench, 1)
    newcomer(bench, 2)
    assert claim(bench, 2) == 1
    newcomer(bench, 3, attempt=3)
    assert claim(bench, 3) is None
    bench.on(ev.Gone(2, is_dead=True))
    assert claim(bench, 3) == 1


def test_d2_a_claimant_that_lost_its_connection_may_write_there_all_the_same(bench: Bench) -> None:
    """Two trainers that write in one arena would hand a mixture off, whole by its header."""
    left_by(bench, 1)
    newcomer(bench, 2)
    assert claim(bench, 2) == 1
    bench.on(ev.Gone(2, is_dead=False))
    newcomer(bench, 3, attempt=3)
    assert claim(bench, 3) is None
    bench.on(ev.Gone(2, is_dead=True))
    assert claim(bench, 3) == 1


def test_d2_a_claimant_that_came_again_and_dies_then_frees_it(bench: Bench) -> None:
    left_by(bench, 1)
    newcomer(bench, 2)
    assert claim(bench, 2) == 1
    bench.on(ev.Gone(2, is_dead=False))
    newcomer(bench, 3)  # the same process
    bench.on(ev.Gone(2, is_dead=True))  # of a connection that it has no more
    newcomer(bench, 4, attempt=3)
    assert claim(bench, 4) is None
    bench.on(ev.Gone(3, is_dead=True))
    assert claim(bench, 4) == 1


def test_a_claimant_whose_answer_was_lost_gets_the_same_arena_when_it_asks_again(
    bench: Bench,
) -> None:
    left_by(bench, 1)
    newcomer(bench, 2)
    assert claim(bench, 2) == 1
    newcomer(bench, 3)  # takes the place of its first connection
    assert claim(bench, 3) == 1


def test_a_claimant_that_says_goodbye_for_good_frees_it(bench: Bench) -> None:
    left_by(bench, 1)
    newcomer(bench, 2)
    assert claim(bench, 2) == 1
    bench.say(2, say.Goodbye())
    newcomer(bench, 3, attempt=3)
    assert [row.step for row in seen(bench, 3)] == [10], "it wrote nothing"
    assert claim(bench, 3) == 1


def test_p3_a_trainer_that_came_again_before_it_died_is_dead_all_the_same(bench: Bench) -> None:
    """Its arena was announced over its first connection, whose end told of no death."""
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    join_with(bench, 2, is_announced=False)
    bench.on(ev.Gone(2, is_dead=False))
    join_with(bench, 3, is_announced=False)
    bench.on(ev.Gone(3, is_dead=True))
    newcomer(bench, 4)
    assert claim(bench, 4) == 1


def test_the_death_of_another_rank_frees_nothing(bench: Bench) -> None:
    join_with(bench, 1, world_size=8)
    join_with(bench, 2, rank=1, world_size=8)
    for client in (1, 2):
        bench.say(client, handoff(10, 1))
        bench.on(ev.PartFailed(bench.part(10, 1, rank=client - 1), "no"))
    bench.on(ev.Gone(1, is_dead=False))
    bench.on(ev.Gone(2, is_dead=True))
    newcomer(bench, 3)
    assert claim(bench, 3) == 2
    newcomer(bench, 4, rank=1)
    assert claim(bench, 4) is None


# --- where none fits ---------------------------------------------------------------------------


def test_p3_where_none_fits_one_older_arena_makes_room(bench: Bench) -> None:
    left_by(bench, 1)
    left_by(bench, 2, rank=1, world_size=8)
    newcomer(bench, 3)
    effects = bench.say(3, say.Claim(1, 1 << 20))
    assert answer(effects, 3) is None
    assert of(ev.Release, effects) == [ev.Release(1, 1)], "its own rank's, and one only"
    assert [owner.number for owner in bench.engine.memory.kept] == [2]


def test_where_none_fits_those_of_the_same_attempt_stay(bench: Bench) -> None:
    left_by(bench, 1, attempt=2, world_size=8)
    newcomer(bench, 2, rank=1)
    effects = bench.say(2, say.Claim(1, 1 << 20))
    assert answer(effects, 2) is None
    assert not of(ev.Release, effects)


def test_where_none_fits_what_is_being_stored_stays(bench: Bench) -> None:
    join_with(bench, 1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    newcomer(bench, 2)
    effects = bench.say(2, say.Claim(1, 1 << 20))
    assert answer(effects, 2) is None
    assert not of(ev.Release, effects)
    assert bench.engine.memory.kept


def test_p3_who_has_made_an_arena_is_given_none_and_an_older_one_makes_room(bench: Bench) -> None:
    join_with(bench, 1)
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    newcomer(bench, 2)
    assert claim(bench, 2) == "later"
    assert answer(announce(bench, 2, 999), 2) is None, "nobody waits for it any more"
    bench.store(10, 1)
    effects = bench.say(2, WISH)
    assert answer(effects, 2) is None
    assert of(ev.Release, effects) == [ev.Release(1, 1)]


# --- heirs -------------------------------------------------------------------------------------


def heir(bench: Bench) -> None:
    """Let client 2 take the arena of client 1 over, in which a step lies in slot 0."""
    left_by(bench, 1)
    newcomer(bench, 2)
    assert claim(bench, 2) == 1


def test_p2_an_arena_that_its_heir_announces_is_mapped_once(bench: Bench) -> None:
    heir(bench)
    effects = announce(bench, 2, 101)
    assert of(ev.Release, effects) == [ev.Release(1, 1)]
    assert bench.engine.memory.kept == []
    assert bench.engine.clients.keys() == {2}


def test_d6_an_heir_leaves_what_it_inherited_and_what_it_wrote(bench: Bench) -> None:
    heir(bench)
    announce(bench, 2, 101)
    bench.say(2, handoff(30, 1, slot=1))
    newcomer(bench, 3, attempt=3)
    assert seen(bench, 3) == [], "it lives, and may write anywhere"
    bench.on(ev.Gone(2, is_dead=True))
    rows = seen(bench, 3)
    assert [(r.attempt, r.token, r.step, r.slot, r.world_size) for r in rows] == [
        (1, "t1", 10, 0, 1),
        (2, "t2", 30, 1, 8),
    ]
    assert {row.arena for row in rows} == {2}, "under the number of the one that has it"
    (lend,) = of(ev.Lend, bench.say(3, say.Borrow(2, 0, 1)))
    assert lend.owner == (2, 1)
    assert lend.message.handoff.step == 10


def test_what_an_heir_writes_over_is_forgotten(bench: Bench) -> None:
    heir(bench)
    announce(bench, 2, 101)
    bench.say(2, handoff(30, 1))
    bench.on(ev.Gone(2, is_dead=True))
    newcomer(bench, 3, attempt=3)
    assert [row.step for row in seen(bench, 3)] == [30]


def test_p3_what_was_claimed_and_is_not_used_goes_when_another_arena_is_announced(
    bench: Bench,
) -> None:
    heir(bench)
    effects = announce(bench, 2, 999, slot_bytes=1 << 20)
    assert of(ev.Release, effects) == [ev.Release(1, 1)]
    bench.on(ev.Gone(2, is_dead=True))
    newcomer(bench, 3, attempt=3)
    assert seen(bench, 3) == []


def test_s6_memory_that_is_cut_into_other_slots_is_not_taken_for_the_same(bench: Bench) -> None:
    """What was handed off from a slot must be looked for in that slot."""
    heir(bench)
    announce(bench, 2, 101, slots=1, slot_bytes=16384)
    bench.on(ev.Gone(2, is_dead=True))
    join_with(bench, 3, rank=1, world_size=8, attempt=2)
    bench.say(3, handoff(30, 1, slot=1))
    announce(bench, 3, 103, slots=1, slot_bytes=16384)
    bench.on(ev.Gone(3, is_dead=True))
    newcomer(bench, 4, attempt=3)
    assert seen(bench, 4) == []


def test_memory_that_is_known_from_no_other_is_never_taken_for_the_same(bench: Bench) -> None:
    join_with(bench, 1)
    bench.say(1, say.Arena(1, 2, 8192))  # of an engine in the trainer's process
    bench.say(1, handoff(10, 1))
    bench.on(ev.Gone(1, is_dead=True))
    bench.store(10, 1)
    join_with(bench, 2, attempt=2)
    bench.say(2, say.Arena(1, 2, 8192))
    assert [owner.number for owner in bench.engine.memory.kept] == [1]


def test_a_trainer_that_lost_its_connection_has_its_arena_back(bench: Bench) -> None:
    join_with(bench, 1)
    bench.write(1, 10, 1)
    bench.judge(10)
    bench.on(ev.Gone(1, is_dead=False))
    join_with(bench, 2, identity=101)
    assert bench.engine.clients.keys() == {2}
    assert of(ev.Release, bench.effects) == [ev.Release(1, 1)]
    bench.on(ev.Gone(2, is_dead=True))
    newcomer(bench, 3)
    assert [(row.step, row.arena) for row in seen(bench, 3)] == [(10, 2)]


def test_a_checkpoint_of_the_heirs_attempt_lets_what_it_has_not_announced_go(bench: Bench) -> None:
    """Its rank 0 committed; this rank has the memory itself."""
    left_by(bench, 1, rank=1, world_size=8)
    join_with(bench, 2, world_size=8, attempt=2)
    newcomer(bench, 3, rank=1)
    assert claim(bench, 3) == 1
    bench.say(2, handoff(30, 1))
    effects = bench.judge(30, attempt=2)
    assert of(ev.Release, effects) == [ev.Release(1, 1)]
    announce(bench, 3, 101)
    assert bench.engine.memory.kept == []
