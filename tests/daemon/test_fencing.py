"""One daemon per socket; one that was paused changes nothing of what others did meanwhile."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from ckptd.model.keys import StepId
from ckptd.wire.address import is_serving
from tests.fakes.jobs import Place, wait_until
from tests.fakes.trainers import (
    FakeTrainer,
    assert_all_whole,
    assert_holds,
    committed_steps,
    contents,
)

pytestmark = pytest.mark.system


def files(root: str) -> dict[str, tuple[int, bytes]]:
    """Return inode and bytes of every file."""
    return {
        str(path): (path.stat().st_ino, path.read_bytes())
        for path in Path(root).rglob("*")
        if path.is_file()
    }


def test_p5_a_second_daemon_on_one_socket_leaves_and_the_first_serves_on(place: Place) -> None:
    first = place.daemon()
    second = place.start_daemon()
    assert second.wait() == 2
    assert "already serves" in second.text
    with FakeTrainer(first.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        assert trainer.outcome(10).state == "committed"


def test_l9_of_several_daemons_started_at_once_exactly_one_serves(place: Place) -> None:
    daemons = [place.start_daemon() for _ in range(4)]
    wait_until(lambda: sum(d.is_running for d in daemons) == 1, "all but one leave")
    (first,) = [d for d in daemons if d.is_running]
    assert sorted(d.wait() for d in daemons if d is not first) == [2, 2, 2]
    assert is_serving(first.wait_serving().socket)


def test_l10_the_socket_of_a_dead_daemon_is_taken_over(place: Place) -> None:
    first = place.daemon()
    first.kill()
    assert os.path.exists(first.socket)
    assert not is_serving(first.socket)
    second = place.daemon()
    with FakeTrainer(second.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        assert trainer.outcome(10).state == "committed"


def test_l10_a_file_in_the_place_of_the_socket_is_left_alone(place: Place) -> None:
    path = Path(place.socket())
    path.write_text("mine")
    daemon = place.start_daemon()
    assert daemon.wait() == 2
    assert "not a socket" in daemon.text
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "point", ["handoff.taken", "chunk.put", "chunks.sync", "rank.put", "store.link@4", "commit.put"]
)
def test_p5_a_paused_daemon_changes_nothing_that_another_one_committed(
    place: Place, point: str
) -> None:
    name, _, turn = point.partition("@")
    paused = place.daemon("old", failpoints=f"{name}=stop@{turn or 1}")
    store = place.store()
    with FakeTrainer(paused.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        wait_until(paused.is_stopped, "the daemon stops")
        other = place.daemon("new")
        trainer.connect(other.socket).offer(10)
        assert trainer.outcome(10).state == "committed"
        before = files(place.root)
        paused.send(signal.SIGCONT)
        trainer.finished.clear()
        trainer.connect(paused.socket).offer(10)
        assert trainer.outcome(10).state == "committed"
        trainer.hang_up()  # or it would be waited for
        assert paused.end() == 0
        assert files(place.root) == before
    assert assert_all_whole(store) == [10]
    assert_holds(store, StepId(attempt=1, step=10), contents(10))
    store.close()


def test_p5_a_paused_daemon_is_not_replaced_on_its_own_socket(place: Place) -> None:
    paused = place.daemon(failpoints="rank.put=stop")
    with FakeTrainer(paused.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        wait_until(paused.is_stopped, "the daemon stops")
        assert place.start_daemon().wait() == 2
        paused.send(signal.SIGCONT)
        assert trainer.outcome(10).state == "committed"


def test_d4_a_paused_committer_meets_the_tombstone_that_came_first(place: Place) -> None:
    paused = place.daemon("old", failpoints="commit.put=stop")
    store = place.store()
    with FakeTrainer(paused.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        wait_until(paused.is_stopped, "the daemon stops")
        other = place.daemon("new")
        trainer.connect(other.socket).forfeit(10, 1, "given up")
        assert trainer.outcome(10).state == "failed"
        paused.send(signal.SIGCONT)
        trainer.finished.clear()
        trainer.connect(paused.socket).say(trainer.handoffs[10])
        assert trainer.outcome(10).state == "failed"
        trainer.hang_up()  # or it would be waited for
        assert paused.end() == 0
    assert committed_steps(store) == []
    store.close()


def test_p4_p5_a_slot_that_moved_on_under_a_paused_daemon_is_never_a_mixture(place: Place) -> None:
    daemon = place.daemon(failpoints="chunk.put=stop", CKPTD_WORKERS="1")
    store = place.store()
    with FakeTrainer(daemon.socket, place.root, slots=1) as trainer:
        assert len(trainer.packed.chunks) > 1
        trainer.connect().save(10, 1)
        wait_until(daemon.is_stopped, "the daemon stops inside of the snapshot")
        trainer.save(20, 2)
        daemon.send(signal.SIGCONT)
        assert trainer.outcome(10).state == "failed"
        assert "used again" in trainer.finished[10].reason
        assert trainer.outcome(20).state == "committed"
    assert assert_all_whole(store) == [20]
    assert_holds(store, StepId(attempt=1, step=20), contents(20))
    store.close()


def test_d6_a_connection_lost_in_the_middle_costs_nothing_while_the_daemon_lives(
    place: Place,
) -> None:
    daemon = place.daemon(failpoints="chunk.put=stop")
    store = place.store()
    with FakeTrainer(daemon.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        wait_until(daemon.is_stopped, "the daemon stops")
        trainer.hang_up()
        daemon.send(signal.SIGCONT)
        trainer.connect().offer(10)
        assert trainer.outcome(10).state == "committed"
        trainer.connect().save(20, 2)
        assert trainer.outcome(20).state == "committed"
    assert assert_all_whole(store) == [10, 20]
    store.close()
