"""Arenas that outlive a daemon: what the engine has kept, and what it makes of what comes back."""

from __future__ import annotations

from typing import Any

import pytest

from ckptd.engine import events as ev
from ckptd.engine.events import Effect
from ckptd.engine.keeper import Snapshot
from ckptd.engine.memory import KEEP_S
from ckptd.wire import messages as say
from tests.fakes.engines import (
    Bench,
    announce,
    handoff,
    hello,
    join_with,
    left_by,
    of,
    recipe,
    seen,
)

SHAPE = say.Arena(1, 2, 8192)
INODE = 500


def said_by(bench: Bench, client: int, message: say.FromTrainer, pid: int) -> list[Effect]:
    return bench.on(ev.Said(client, message, pid))


def join_from(bench: Bench, client: int, pid: int, *, rank: int = 0, attempt: int = 1) -> None:
    """Bring a client of a known process to the point where it may announce its memory."""
    said_by(bench, client, hello(rank, 1 + rank, attempt), pid)
    bench.on(ev.Opened(client))
    bench.say(client, recipe())


def restore(
    bench: Bench, client: int = 1, *, step: int = 10, attempt: int = 1, rank: int = 0,
    world_size: int = 1, is_dead: bool = False, inode: int = INODE,
) -> list[Effect]:  # fmt: skip
    """Give the engine what a former daemon had of one rank."""
    snapshot = Snapshot(hello(rank, world_size, attempt), handoff(step, 1), recipe())
    return bench.on(ev.Restored(client, SHAPE, inode, {0: snapshot}, is_dead))


def kinds(effects: list[Effect]) -> list[Any]:
    return [type(effect) for effect in effects]


# --- what is kept --------------------------------------------------------------------------------


def test_d6_a_snapshot_is_kept_before_its_trainer_may_die() -> None:
    bench = Bench()
    bench.join(1)
    effects = bench.say(1, message := handoff(10, 1, slot=1))
    snapshot = Snapshot(hello(), message, recipe())
    assert effects[:2] == [ev.Keep(1, 1, 1, snapshot), ev.Send(1, say.Taken(10, 1))]


def test_an_arena_is_kept_with_the_process_that_writes_there() -> None:
    bench = Bench()
    join_from(bench, 1, pid=77)
    assert of(ev.KeepArena, announce(bench, 1, INODE)) == [ev.KeepArena(1, SHAPE, 77)]


def test_memory_is_kept_for_an_heir_before_the_former_lets_go_of_it() -> None:
    bench = Bench()
    left_by(bench, 1, identity=INODE)
    join_from(bench, 2, pid=78, attempt=2)
    effects = announce(bench, 2, INODE)
    found = [e for e in effects if isinstance(e, (ev.KeepArena, ev.Release))]
    assert found == [ev.KeepArena(2, SHAPE, 78), ev.Release(1, 1)]


def test_an_arena_that_was_refused_is_not_kept() -> None:
    bench = Bench()
    assert of(ev.KeepArena, bench.on(ev.Mapped(1, SHAPE, INODE))) == []


def test_p5_memory_that_is_given_away_is_that_process_s_from_then_on() -> None:
    """It may begin to write before it announces the arena: nobody else may get it meanwhile."""
    bench = Bench()
    left_by(bench, 1, identity=INODE)
    join_from(bench, 2, pid=78, attempt=2)
    effects = bench.say(2, say.Claim(2, 8192))
    assert kinds(effects) == [ev.KeepArena, ev.Lend]
    assert of(ev.KeepArena, effects) == [ev.KeepArena(1, SHAPE, 78)]


# --- what comes back -----------------------------------------------------------------------------


def test_what_comes_back_is_shown_and_lent_to_a_restarted_trainer() -> None:
    bench = Bench()
    restore(bench)
    join_with(bench, 5, attempt=2)
    (row,) = seen(bench, 5)
    assert (row.attempt, row.step, row.rank, row.arena, row.slot) == (1, 10, 0, 1, 0)
    (lent,) = of(ev.Lend, bench.say(5, say.Borrow(row.arena, row.slot, row.generation)))
    assert lent.owner == (1, 1)
    assert isinstance(lent.message, say.Lent)
    assert (lent.message.handoff, lent.message.recipe) == (handoff(10, 1), recipe())


def test_memory_whose_trainer_may_live_is_not_given_away_until_it_is_dead() -> None:
    bench = Bench()
    restore(bench)
    join_with(bench, 5, attempt=2, is_announced=False)
    assert of(ev.Lend, bench.say(5, say.Claim(2, 8192))) == []
    bench.on(ev.Gone(1, is_dead=True))
    join_with(bench, 6, rank=1, world_size=2, attempt=3, is_announced=False)
    (ceded,) = of(ev.Lend, bench.say(6, say.Claim(2, 8192)))
    assert ceded.owner == (1, 1)


def test_memory_of_a_dead_trainer_is_given_away_at_once() -> None:
    bench = Bench()
    restore(bench, is_dead=True)
    join_with(bench, 5, attempt=2, is_announced=False)
    (ceded,) = of(ev.Lend, bench.say(5, say.Claim(2, 8192)))
    assert ceded.owner == (1, 1)


def test_a_trainer_that_lives_comes_back_for_its_memory() -> None:
    bench = Bench()
    restore(bench, step=10)
    join_with(bench, 5, is_announced=False)
    assert of(ev.Release, announce(bench, 5, INODE)) == [ev.Release(1, 1)]
    bench.on(ev.Gone(5, is_dead=True))
    join_with(bench, 6, attempt=2)
    assert [(row.step, row.arena) for row in seen(bench, 6)] == [(10, 5)]


def test_the_death_of_a_trainer_that_came_back_is_told_by_its_new_connection() -> None:
    bench = Bench()
    restore(bench)
    join_with(bench, 5, is_announced=False)
    bench.on(ev.Gone(5, is_dead=True))
    join_with(bench, 6, attempt=2, is_announced=False)
    (ceded,) = of(ev.Lend, bench.say(6, say.Claim(2, 8192)))
    assert ceded.owner == (1, 1)


def test_d6_a_rank_that_has_not_come_back_is_not_waited_for_in_vain() -> None:
    """Its part may be in the store since before the daemon was killed: somebody has to look."""
    bench = Bench()
    restore(bench, 1, rank=0, world_size=2)
    restore(bench, 2, rank=1, world_size=2, inode=INODE + 1)
    bench.join(5, rank=0, world_size=2)
    assert of(ev.Try, bench.write(5, 20, 2))


def test_what_comes_back_goes_after_a_while() -> None:
    bench = Bench()
    restore(bench)
    assert bench.engine.next_due() is not None
    assert of(ev.Release, bench.tick(KEEP_S - 1)) == []
    assert of(ev.Release, bench.tick(1)) == [ev.Release(1, 1)]
    assert bench.engine.clients == {}


def test_what_comes_back_goes_when_a_newer_attempt_has_a_checkpoint() -> None:
    bench = Bench()
    restore(bench)
    bench.join(5, attempt=2)
    bench.say(5, handoff(20, 1))
    assert of(ev.Release, bench.judge(20, attempt=2)) == [ev.Release(1, 1)]


def test_a_daemon_that_keeps_nothing_lets_go_of_what_comes_back() -> None:
    assert of(ev.Release, restore(Bench(linger_s=0.0))) == [ev.Release(1, 1)]


def test_the_newest_snapshot_says_whose_an_arena_is() -> None:
    bench = Bench()
    old = Snapshot(hello(3, 4, 1), handoff(90, 9, slot=0), recipe())
    new = Snapshot(hello(0, 1, 2), handoff(10, 1, slot=1), recipe())
    bench.on(ev.Restored(1, SHAPE, INODE, {0: old, 1: new}, False))
    assert bench.engine.clients[1].hello == new.hello
    join_with(bench, 5, attempt=3)
    assert sorted((row.attempt, row.rank) for row in seen(bench, 5)) == [(1, 3), (2, 0)]


@pytest.mark.parametrize("linger_s", [None, 5.0])
def test_a_daemon_with_nothing_but_memory_that_came_back_stays_as_long_as_any(
    linger_s: float | None,
) -> None:
    bench = Bench(linger_s=linger_s)
    restore(bench)
    assert of(ev.Exit, bench.tick(4)) == []
    exits = of(ev.Exit, bench.tick(2))
    assert exits == ([] if linger_s is None else [ev.Exit(0)])
