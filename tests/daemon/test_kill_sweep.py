"""A daemon dies at every failpoint, the first, second, third ... time it comes there.

After each death all that is listed is whole, a new daemon commits the same snapshots, and there is
nothing to clean by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from ckptd.errors import DaemonUnavailableError
from ckptd.model.keys import StepId
from tests.fakes.jobs import Place, Process
from tests.fakes.trainers import (
    FakeTrainer,
    assert_all_whole,
    assert_holds,
    committed_steps,
    contents,
)

pytestmark = pytest.mark.system

SAVING = [
    "handoff.taken", "chunk.put", "chunks.sync", "rank.put", "rank.done", "commit.put",
    "commit.done", "store.write", "store.link", "store.sync",
]  # fmt: skip
ENDING = ["outcome.put", "tombstone.put", "store.write", "store.link"]
MOST_TURNS = 40


@contextmanager
def two_ranks(place: Place) -> Iterator[list[FakeTrainer]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(FakeTrainer(place.socket(), place.root, rank=rank, world_size=2))
            for rank in range(2)
        ]


def offer_all(ranks: list[FakeTrainer], step: int) -> bool:
    """Hand a step off on ranks without a final word; tell whether all have one in the end."""
    open_ranks = [trainer for trainer in ranks if step not in trainer.finished]
    try:
        for trainer in open_ranks:
            trainer.connect()
        for trainer in open_ranks:
            trainer.offer(step)
    except DaemonUnavailableError:
        pass  # killed already; what it said before can still be read
    words = [trainer.outcome(step) for trainer in open_ranks]
    return None not in words


def end(daemon: Process, ranks: list[FakeTrainer]) -> int:
    """Let a daemon go, which waits for its clients; return its exit code."""
    for trainer in ranks:
        trainer.hang_up()
    return daemon.end()


def recover(place: Place, ranks: list[FakeTrainer], step: int) -> None:
    """Check what a killed daemon left, and let a new one finish the step."""
    store = place.store()
    assert_all_whole(store)
    assert set(committed_steps(store)) | {step} == set(range(10, step + 10, 10))
    daemon = place.daemon()
    assert offer_all(ranks, step)
    assert [trainer.finished[step].state for trainer in ranks] == ["committed"] * 2
    assert end(daemon, ranks) == 0
    assert assert_all_whole(store) == list(range(10, step + 10, 10))
    assert_holds(store, StepId(attempt=1, step=step), contents(step))
    assert place.temporary_files() == []
    store.close()


@pytest.mark.parametrize("point", SAVING)
def test_d6_a_daemon_killed_anywhere_in_a_save_loses_nothing(place: Place, point: str) -> None:
    with two_ranks(place) as ranks:
        for turn in range(1, MOST_TURNS):
            step = 10 * turn
            daemon = place.daemon(failpoints=f"{point}=kill@{turn}")
            for trainer in ranks:
                trainer.fill(step, turn)
            if offer_all(ranks, step):
                assert end(daemon, ranks) == 0
                assert turn > 1
                return
            assert daemon.wait() == -9
            recover(place, ranks, step)
    raise AssertionError(f"{point} is hit more than {MOST_TURNS} times")


@pytest.mark.parametrize("point", ENDING)
def test_d6_a_daemon_killed_while_it_ends_a_step_leaves_no_checkpoint_of_it(
    place: Place, point: str
) -> None:
    store = place.store()
    with two_ranks(place) as ranks:
        for turn in range(1, MOST_TURNS):
            step = 10 * turn
            daemon = place.daemon(failpoints=f"{point}=kill@{turn}")
            is_over = refuse(ranks, step, turn)
            if not is_over:
                assert daemon.wait() == -9
                assert committed_steps(store) == []
                daemon = place.daemon()
                assert refuse(ranks, step, turn)
            for trainer in ranks:
                assert trainer.finished[step].state == "failed"
                assert "rank 1" in trainer.finished[step].reason
            # What rank 0 still stores of an ended step may be where the daemon dies.
            code = end(daemon, ranks)
            assert code == 0 or is_over
            assert committed_steps(store) == []
            assert place.temporary_files() == []
            if is_over and code == 0:
                assert turn > 1
                break
    store.close()


def refuse(ranks: list[FakeTrainer], step: int, sequence: int) -> bool:
    """Save a step on rank 0 that rank 1 does not deliver; tell whether both heard how it ended."""
    open_ranks = [trainer for trainer in ranks if step not in trainer.finished]
    try:
        for trainer in open_ranks:
            trainer.connect()
        for trainer in open_ranks:
            if trainer.rank == 1:
                trainer.forfeit(step, sequence, "it would not")
            elif step in trainer.handoffs:
                trainer.offer(step)
            else:
                trainer.save(step, sequence)
    except DaemonUnavailableError:
        pass
    words = [trainer.outcome(step) for trainer in open_ranks]
    return None not in words


def test_d5_d11_a_failing_step_of_a_save_is_told_truly_and_later_saves_work(place: Place) -> None:
    failed = 0
    with two_ranks(place) as ranks:
        sequence = 0
        for turn in range(1, 8):
            daemon = place.daemon(failpoints=";".join(f"{p}=raise@{turn}" for p in SAVING + ENDING))
            for trainer in ranks:
                trainer.connect()
            last = []
            while last[-3:] != ["committed"] * 3:
                sequence += 1
                for trainer in ranks:
                    trainer.save(10 * sequence, sequence)
                words = {trainer.outcome(10 * sequence).state for trainer in ranks}
                assert words in ({"committed"}, {"failed"})
                last += words
            failed += last.count("failed")
            assert last[-1] == "committed"
            assert end(daemon, ranks) == 0
        store = place.store()
        said = [step for step, word in ranks[0].finished.items() if word.state == "committed"]
        assert assert_all_whole(store) == said
        assert all(
            "failpoint" in word.reason
            for word in ranks[0].finished.values()
            if word.state == "failed"
        )
        assert place.temporary_files() == []
        store.close()
    assert failed > 10


def test_e1_a_daemon_killed_on_its_way_out_has_lost_nothing(place: Place) -> None:
    with two_ranks(place) as ranks:
        daemon = place.daemon(failpoints="engine.exit=kill")
        for trainer in ranks:
            trainer.connect().save(10, 1)
        for trainer in ranks:
            trainer.outcome(10)
        assert end(daemon, ranks) == -9
        recover(place, ranks, 10)
