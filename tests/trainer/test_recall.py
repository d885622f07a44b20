"""Which steps living daemons hold, and what is made of what they lend."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.model.keys import MAX_STEP, StepId
from ckptd.shm.arena import Arena, round_up
from ckptd.trainer.link import Link
from ckptd.trainer.recall import HeldPart, HeldStep, Recall, Sighting, claim, held_steps
from ckptd.wire import messages as say
from tests.fakes.engines import handoff, hello, recipe
from tests.fakes.ports import WAIT_S, FakeDaemon, FakePort, Script, welcome

SLOT = round_up(4096)


def row(
    rank: int = 0, world_size: int = 1, *, attempt: int = 1, step: int = 10, sequence: int = 1,
    token: str = "t", arena: int = 7, slot: int = 0, generation: int = 3,
) -> say.HeldSnapshot:  # fmt: skip
    return say.HeldSnapshot(
        attempt, token, step, sequence, rank, world_size, arena, slot, generation
    )


def sighting(daemon: str, *rows: say.HeldSnapshot) -> Sighting:
    return Sighting(daemon, rows)


def ids(held: list[HeldStep]) -> list[StepId]:
    return [StepId.parse(step.id) for step in held]


# --- which steps ---------------------------------------------------------------------------------


def test_a_step_that_daemons_hold_whole_between_them_is_held() -> None:
    (held,) = held_steps(
        [sighting("a", row(0, 2)), sighting("b", row(1, 2, arena=9, slot=1, generation=5))], 2, []
    )
    assert held == HeldStep(
        "000000000010-0001", "t", 1, 2,
        {0: HeldPart("a", 7, 0, 3), 1: HeldPart("b", 9, 1, 5)},
    )  # fmt: skip


def test_r1_a_hole_is_no_step() -> None:
    assert held_steps([sighting("a", row(0, 2))], 2, []) == []
    assert held_steps([sighting("a", row(0, 3), row(2, 3))], 2, []) == []


def test_nothing_seen_is_nothing_held() -> None:
    assert held_steps([], 2, []) == []
    assert held_steps([Sighting(), Sighting("a")], 2, []) == []


def test_a_committed_step_may_have_parts_in_the_store_only() -> None:
    committed = [StepId(1, 5), StepId(1, 10)]
    (held,) = held_steps([sighting("a", row(1, 2))], 2, committed)
    assert held.is_committed
    assert held.parts == {1: HeldPart("a", 7, 0, 3)}


def test_r1_no_step_older_than_the_newest_checkpoint_is_held() -> None:
    rows = [row(step=step, slot=step % 2) for step in (9, 10, 11)]
    assert ids(held_steps([sighting("a", *rows)], 2, [StepId(1, 10)])) == [
        StepId(1, 11), StepId(1, 10),
    ]  # fmt: skip
    assert held_steps([sighting("a", *rows)], 3, [StepId(2, 1)]) == [], "of a later attempt"


def test_r1_the_newest_is_first_by_attempt_and_then_by_step() -> None:
    rows = [row(attempt=a, step=s, arena=a) for a, s in ((1, 30), (2, 20), (2, 25), (1, 40))]
    random.Random(1).shuffle(rows)
    assert ids(held_steps([sighting("a", *rows)], 3, [])) == [
        StepId(2, 25), StepId(2, 20), StepId(1, 40), StepId(1, 30),
    ]  # fmt: skip


def test_d9_two_saves_of_one_step_are_not_put_together() -> None:
    rows = [row(0, 2, sequence=1), row(1, 2, sequence=2)]
    assert held_steps([sighting("a", *rows)], 2, []) == []
    rows.append(row(1, 2, sequence=1, slot=1))
    (held,) = held_steps([sighting("a", *rows)], 2, [])
    assert (held.sequence, held.parts[1].slot) == (1, 1)


def test_d9_jobs_that_had_one_name_and_worlds_of_other_sizes_are_not_put_together() -> None:
    assert held_steps([sighting("a", row(0, 2, token="x"), row(1, 2, token="y"))], 2, []) == []
    assert held_steps([sighting("a", row(0, 2), row(1, 3))], 2, []) == []


@pytest.mark.parametrize("attempt", [2, 3])
def test_d9_only_attempts_before_this_one_count(attempt: int) -> None:
    assert held_steps([sighting("a", row(attempt=attempt))], 2, []) == []


@pytest.mark.parametrize(
    "odd",
    [row(1, 1), row(5, 2), row(0, 0), row(step=MAX_STEP + 1), row(step=1 << 48)],
    ids=["rank", "rank of two", "no world", "step", "large step"],
)
def test_s6_a_row_that_makes_no_sense_is_left_out(odd: say.HeldSnapshot) -> None:
    good = row(step=11)
    assert ids(held_steps([sighting("a", odd, good)], 2, [])) == [StepId(1, 11)]


def test_ranks_of_one_machine_see_the_same_and_it_counts_once() -> None:
    seen = sighting("a", row(0, 2), row(1, 2, arena=8))
    (held,) = held_steps([seen, seen, Sighting(), seen], 2, [])
    assert held.parts == {0: HeldPart("a", 7, 0, 3), 1: HeldPart("a", 8, 0, 3)}


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Sighting], list[StepId]]:
    """What is left of a few steps, spread over daemons of which several ranks may be clients."""
    sightings: list[list[say.HeldSnapshot]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for attempt, step in draw(st.sets(st.tuples(st.integers(1, 3), st.integers(0, 4)), max_size=6)):
        world_size = draw(st.integers(1, 3))
        for rank in draw(st.sets(st.integers(0, world_size - 1))):
            place = draw(st.integers(0, len(sightings) - 1))
            sightings[place].append(row(rank, world_size, attempt=attempt, step=step, arena=rank))
    committed = draw(st.lists(st.builds(StepId, st.integers(1, 3), st.integers(0, 4))))
    seen = [sighting(f"d{i}", *rows) for i, rows in enumerate(sightings)]
    return [*seen, *draw(st.lists(st.sampled_from(seen), max_size=2))], committed


@settings(max_examples=200)
@given(worlds(), st.integers(1, 4))
def test_r1_what_is_held_is_whole_or_committed_and_never_older_than_a_checkpoint(
    world: tuple[list[Sighting], list[StepId]], attempt: int
) -> None:
    sightings, committed = world
    rows = {(s.daemon, r) for s in sightings for r in s.rows}
    held = held_steps(sightings, attempt, committed)
    assert ids(held) == sorted(ids(held), reverse=True)
    for step in held:
        id_ = StepId.parse(step.id)
        assert id_.attempt < attempt
        assert all(id_ >= other for other in committed)
        assert step.is_committed == (id_ in committed)
        assert step.is_committed or set(step.parts) == set(range(step.world_size))
        for rank, part in step.parts.items():
            found = row(
                rank, step.world_size, attempt=id_.attempt, step=id_.step, arena=part.arena,
                slot=part.slot, generation=part.generation,
            )  # fmt: skip
            assert (part.daemon, found) in rows
    whole = {
        StepId(r.attempt, r.step) for _, r in rows
        if r.attempt < attempt and all(StepId(r.attempt, r.step) >= c for c in committed)
        and len({o.rank for _, o in rows if (o.attempt, o.step) == (r.attempt, r.step)})
        == r.world_size
    }  # fmt: skip
    assert whole <= set(ids(held))
    mixed = sightings[::-1]
    assert ids(held_steps(mixed, attempt, committed)) == ids(held), "whoever is asked first"


# --- what is asked -------------------------------------------------------------------------------


@pytest.fixture
def link() -> Iterator[object]:
    made: list[Link] = []

    def start(script: Script) -> Link:
        made.append(Link(FakeDaemon(script).open, hello(attempt=2), give_up_s=5.0))
        return made[-1]

    yield start
    for each in made:
        each.close()


def answering(*answers: tuple[say.FromDaemon, int | None]) -> Script:
    """Give these answers to what is asked, one after the other, with a descriptor or without."""
    left = list(answers)

    def script(port: FakePort, message: say.FromTrainer) -> None:
        welcome(port, message)
        if isinstance(message, (say.Seek, say.Borrow, say.Claim, say.Settle)):
            answer, fd = left.pop(0)
            if fd is not None:
                port.fds.append(fd)
            port.answer(answer)

    return script


HELD = (say.Held("daemon", (row(),)), None)
PART = HeldPart("daemon", 7, 0, 1)


@pytest.fixture
def arena() -> Iterator[Arena]:
    with Arena.create(2, SLOT) as made:
        yield made


def fd_of(arena: Arena) -> int:
    return os.dup(arena.fileno())


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_without_a_daemon_nothing_is_seen_and_nothing_lent() -> None:
    recall = Recall(None, WAIT_S)
    assert recall.sighting == Sighting()
    recall.settle()
    assert recall.borrow(PART) is None


def test_p1_a_daemon_that_does_not_answer_in_time_holds_nothing(link) -> None:
    recall = Recall(link(welcome), 0.01, 2)
    assert recall.sighting == Sighting()
    recall.settle()
    assert recall.borrow(PART) is None


def test_what_the_daemon_holds_is_seen_at_once(link) -> None:
    recall = Recall(link(answering(HELD)), WAIT_S, 2)
    assert recall.sighting == Sighting("daemon", (row(),))
    assert recall.attempt == 2


def test_d2_what_is_lent_is_mapped_for_reading_only(link, arena: Arena) -> None:
    lent = say.Lent(7, 2, SLOT, handoff(10, 1), recipe())
    recall = Recall(link(answering(HELD, (lent, fd_of(arena)))), WAIT_S, 2)
    borrowed = recall.borrow(PART)
    assert borrowed is not None
    said, how, theirs = borrowed
    assert (said, how) == (handoff(10, 1), recipe())
    assert theirs.slot(0).view.readonly
    theirs.close()


@pytest.mark.parametrize(
    "lent",
    [
        say.Lent(7),
        say.Lent(7, 2, SLOT),
        say.Lent(7, 2, SLOT, handoff(10, 1)),
        say.Lent(7, 2, SLOT, None, recipe()),
        say.Lent(7, 3, SLOT, handoff(10, 1), recipe()),
        say.Lent(7, 2, SLOT + 1, handoff(10, 1), recipe()),
        say.Lent(7, 2, 1 << 48, handoff(10, 1), recipe()),
        say.Lent(7, 1 << 48, SLOT, handoff(10, 1), recipe()),
    ],
    ids=["gone", "nothing said", "no recipe", "no handoff", "slots", "odd", "large", "many"],
)
def test_s6_p2_memory_that_cannot_be_used_is_none_and_is_closed(
    link, arena: Arena, lent: say.Lent
) -> None:
    fd = fd_of(arena) if lent.slots else None
    recall = Recall(link(answering(HELD, (lent, fd))), WAIT_S, 2)
    assert recall.borrow(PART) is None
    assert fd is None or not is_open(fd)


def test_s6_a_descriptor_that_is_no_arena_is_none_and_is_closed(link) -> None:
    fd = os.open(os.devnull, os.O_RDWR)
    lent = say.Lent(7, 2, SLOT, handoff(10, 1), recipe())
    recall = Recall(link(answering(HELD, (lent, fd))), WAIT_S, 2)
    assert recall.borrow(PART) is None
    assert not is_open(fd)


def test_p3_an_arena_that_is_ceded_is_mapped_for_writing(link, arena: Arena) -> None:
    mine = claim(link(answering((say.Ceded(2, SLOT), fd_of(arena)))), 1, SLOT, WAIT_S)
    assert mine is not None
    assert (mine.slots, mine.slot_bytes) == (2, SLOT)
    mine.slot(1).payload[:4] = b"mine"
    assert arena.slot(1).payload[:4].tobytes() == b"mine"
    mine.close()


def test_where_no_arena_is_ceded_there_is_none(link, arena: Arena) -> None:
    assert claim(link(answering((say.Ceded(), None))), 1, SLOT, WAIT_S) is None
    assert claim(link(welcome), 1, SLOT, 0.01) is None
    fd = fd_of(arena)
    assert claim(link(answering((say.Ceded(5, SLOT), fd))), 1, SLOT, WAIT_S) is None
    assert not is_open(fd)
