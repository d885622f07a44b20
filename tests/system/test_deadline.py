"""Saves with a deadline by real ranks, while their daemon has work or is told to go as well."""

from __future__ import annotations

import os
import signal

import pytest

from ckptd.wire.address import socket_path
from tests.fakes.jobs import Place, Rank, Ranks, all_do, wait_until
from tests.fakes.trainers import FakeTrainer, assert_all_whole

pytestmark = pytest.mark.system

LONG_S = 600.0


def path_of(place: Place) -> str:
    """Return the socket that trainers of this place use."""
    return socket_path(place.root, {}, place.env())


def start(place: Place, ranks: Ranks, world_size: int, **env: str) -> list[Rank]:
    """Give ranks that have trained, with a Checkpointer."""
    job = place.job(ranks, world_size, CKPTD_LINGER_S="0.1", **env)
    all_do(job, "build", is_ddp=world_size > 1)
    all_do(job, "open", root=place.root, slots=4)
    all_do(job, "train")
    return job


def wait_draining(place: Place) -> None:
    """Wait until the daemon has heard that it is to go."""
    with FakeTrainer(path_of(place), place.root) as asker:
        asker.dial()
        wait_until(lambda: asker.report()["is_draining"], "the daemon drains")


def committed(place: Place) -> list[int]:
    store = place.store()
    try:
        return assert_all_whole(store)
    finally:
        store.close()


def test_p6_e1_a_daemon_that_was_told_to_go_takes_the_last_snapshot_and_then_goes(
    place: Place, ranks: Ranks
) -> None:
    """As where a pod or a job step is ended: the signal reaches all its processes at once."""
    daemon = place.daemon(path_of(place), CKPTD_DRAIN_S="600")
    job = start(place, ranks, 2)
    all_do(job, "save", step=1, wait=True)
    daemon.send(signal.SIGTERM)
    wait_draining(place)
    all_do(job, "train")
    all_do(job, "save", step=2, deadline_s=LONG_S)
    assert all_do(job, "status", step=2) == ["committed"] * 2
    assert daemon.is_running
    all_do(job, "close")
    assert daemon.wait() == 0
    assert committed(place) == [1, 2]


def test_p6_a_daemon_on_demand_that_was_told_to_go_does_the_same(
    place: Place, ranks: Ranks
) -> None:
    (rank,) = start(place, ranks, 1, CKPTD_DRAIN_S="600")
    rank.do("save", step=1, wait=True)
    (pid,) = place.pids()
    os.kill(pid, signal.SIGTERM)
    wait_draining(place)
    rank.do("train")
    rank.do("save", step=2, deadline_s=LONG_S)
    assert rank.do("status", step=2) == "committed"
    assert place.pids() == [pid], "no other one was needed"
    rank.do("close")
    wait_until(lambda: not place.pids(), "the daemon goes")
    assert committed(place) == [1, 2]


def test_an_urgent_save_is_committed_before_those_that_wait_for_a_store_that_hangs(
    place: Place, ranks: Ranks
) -> None:
    daemon = place.daemon(path_of(place), failpoints="chunk.put=hang", CKPTD_DRAIN_S="0.3")
    (rank,) = start(place, ranks, 1)
    for step in (1, 2):
        rank.do("save", step=step)
        rank.do("train")
    wait_until(lambda: rank.do("status", step=2) == "handed_off", "the daemon has both")
    digest = rank.do("digest")
    rank.do("save", step=3, deadline_s=LONG_S)
    assert [rank.do("status", step=step) for step in (1, 2, 3)] == [
        "handed_off", "handed_off", "committed"
    ]  # fmt: skip
    assert committed(place) == [3]
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 6, "what hangs is left over, and it says so"
    assert [rank.do("result", step=step) for step in (1, 2)] == [1, 2], "by another daemon"
    rank.do("close")
    assert committed(place) == [1, 2, 3]
    (again,) = place.job(ranks, 1, CKPTD_LINGER_S="0.1")
    again.do("build")
    again.do("open", root=place.root)
    assert again.do("resume") == {"step": 3, "attempt": 1}
    assert again.do("digest") == digest
    again.do("close")


def test_when_the_time_is_up_save_says_that_the_daemon_goes_on_and_it_does(
    place: Place, ranks: Ranks
) -> None:
    daemon = place.daemon(path_of(place), failpoints="commit.put=stop")
    (rank,) = start(place, ranks, 1)
    rank.do("save", step=1)
    wait_until(daemon.is_stopped, "the daemon stops before the commit")
    wait_until(lambda: rank.do("status", step=1) == "handed_off", "it has said that it has it")
    rank.do("save", step=1, deadline_s=0.01)
    assert "step 1: not committed in 0.01 s; the daemon has the snapshot and goes on" in rank.text
    rank.kill()
    daemon.send(signal.SIGTERM)
    daemon.send(signal.SIGCONT)
    assert daemon.wait() == 0
    assert committed(place) == [1]
