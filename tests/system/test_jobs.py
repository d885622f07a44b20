"""Jobs of two ranks: a save is everybody's or nobody's, and everybody hears why."""

from __future__ import annotations

import os
import signal

import pytest

from ckptd.wire.address import socket_path
from tests.fakes.jobs import Daemon, Place, Rank, Ranks, all_do, all_fail, wait_until
from tests.fakes.trainers import assert_all_whole, committed_steps

pytestmark = pytest.mark.system


def start(place: Place, ranks: Ranks, *, is_ddp: bool = True, **settings: object) -> list[Rank]:
    """Give two ranks that have trained, with Checkpointers."""
    job = place.job(ranks, 2, CKPTD_LINGER_S="0.5")
    all_do(job, "build", is_ddp=is_ddp)
    all_do(job, "open", root=place.root, **settings)
    if is_ddp:
        all_do(job, "train")
    return job


def steps(place: Place) -> list[int]:
    store = place.store()
    try:
        return assert_all_whole(store)
    finally:
        store.close()


def test_d11_a_rank_whose_state_cannot_be_stored_is_named_to_all(
    place: Place, ranks: Ranks
) -> None:
    job = start(place, ranks)
    job[1].do("put", odd="socket")
    job[0].order("save", step=1)
    assert job[1].fail("save", step=1)["error"] == "UnsupportedValueError"
    assert "value" in job[0].answer()
    wait_until(lambda: "step 1" in job[0].text, "rank 0 hears of it")
    job[1].do("take", name="odd")
    # The failure reaches the next save of those whom nobody told yet; that save is taken.
    for rank in job:
        rank.order("save", step=2)
    said = job[0].answer()
    assert said["error"] == "SaveFailedError"
    assert "rank 1" in said["text"]
    assert "odd" in said["text"]
    assert "value" in job[1].answer()
    assert all_do(job, "result", step=2) == [2, 2]
    all_do(job, "close")
    assert steps(place) == [2]


def test_d9_a_rank_that_comes_too_late_is_named_and_the_next_save_works(
    place: Place, ranks: Ranks
) -> None:
    job = start(place, ranks, commit_timeout_s=4.0)
    job[1].send(signal.SIGSTOP)
    job[0].do("save", step=1)
    said = job[0].fail("result", step=1)
    assert said["error"] == "IncompleteError"
    assert said["missing_ranks"] == [1]
    assert said["step"] == 1
    job[1].send(signal.SIGCONT)
    job[1].do("save", step=1)
    assert job[1].fail("result", step=1)["error"] == "IncompleteError"
    all_do(job, "save", step=2)
    assert all_do(job, "result", step=2) == [2, 2]
    all_do(job, "close")
    assert steps(place) == [2]


@pytest.mark.parametrize("point", ["capture.done", "link.send"])
def test_k1_a_rank_killed_in_the_middle_of_a_save_is_named_to_the_others(
    place: Place, ranks: Ranks, point: str
) -> None:
    job = start(place, ranks)
    all_do(job, "save", step=1)
    all_do(job, "result", step=1)
    job[1].do("arm", spec=f"{point}=kill")
    for rank in job:
        rank.order("save", step=2)
    assert job[1].wait() == -signal.SIGKILL
    assert "value" in job[0].answer()
    said = job[0].fail("result", step=2)
    assert said["error"] == "SaveFailedError"
    assert "rank 1" in said["text"]
    job[0].do("close")
    assert steps(place) == [1]


def test_d9_replicas_that_differ_are_named_with_tensor_and_rank(place: Place, ranks: Ranks) -> None:
    job = start(place, ranks, is_ddp=False)
    job[1].do("bend")
    all_do(job, "save", step=1)
    for said in all_fail(job, "result", step=1):
        assert said["error"] == "ReplicaMismatchError"
        assert said["fqn"] == "model.0.weight"
        assert "0" in said["text"]
        assert "1" in said["text"]
    assert steps(place) == []


def test_a_layout_that_changes_between_saves_costs_bytes_and_never_a_hole(
    place: Place, ranks: Ranks
) -> None:
    job = place.job(ranks, 2, CKPTD_LINGER_S="0.5")
    all_do(job, "build", is_ddp=True)
    all_do(job, "open", root=place.root)
    all_do(job, "save", step=0)  # no moments yet
    for step in (1, 2, 3):
        all_do(job, "train")
        all_do(job, "save", step=step)
    all_do(job, "put", extra=[1, 2])
    all_do(job, "save", step=4)
    for step in range(5):
        assert all_do(job, "result", step=step) == [step, step]
    all_do(job, "close")
    assert steps(place) == [0, 1, 2, 3, 4]


def test_daemons_of_two_nodes_serve_one_job_and_one_of_them_dies(
    place: Place, ranks: Ranks
) -> None:
    first = place.daemon("a", failpoints="commit.put=kill@2")
    place.daemon("b")
    job = place.job(ranks, 2)
    for name, rank in zip("ab", job, strict=True):
        rank.do("setenv", CKPTD_SOCKET=place.socket(name))
    all_do(job, "build", is_ddp=True)
    all_do(job, "open", root=place.root)
    all_do(job, "save", step=1)
    assert all_do(job, "result", step=1) == [1, 1]
    all_do(job, "train")
    all_do(job, "save", step=2)
    assert first.wait() == -signal.SIGKILL
    place.daemon("a")
    assert all_do(job, "result", step=2) == [2, 2]
    all_do(job, "close")
    assert steps(place) == [1, 2]


def test_k3_everything_killed_at_once_again_and_again_never_loses_a_committed_step(
    place: Place, ranks: Ranks
) -> None:
    path = socket_path(place.root, {}, place.env())
    newest = 0
    points = ["chunk.put", "rank.put", "commit.put", "rank.done", "commit.done"]
    for turn, point in enumerate(points, 1):
        daemon = place.daemon(path, failpoints=f"{point}=kill@{turn + 1}")
        job = place.job(ranks, 2)
        all_do(job, "build", is_ddp=True)
        all_do(job, "open", root=place.root)
        first, second = all_do(job, "resume")
        assert first == second
        found = first["step"] if first else 0
        assert found >= newest
        save_until_dead(place, job, daemon, found)
        for rank in job:
            rank.kill()
        assert daemon.wait() == -signal.SIGKILL
        for pid in place.pids():  # a daemon that the trainers started in its place
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not place.pids(), "all are dead")
        newest = max(steps(place), default=0)
    assert newest >= len(points)
    assert place.temporary_files() == []
    assert place.daemon(path).end() == 0


def save_until_dead(place: Place, job: list[Rank], daemon: Daemon, step: int) -> None:
    """Train and save until the daemon dies."""
    while daemon.is_running:
        step += 1
        all_do(job, "train")
        all_do(job, "save", step=step)
        wait_until(lambda last=step: not daemon.is_running or last in listed(place), "a word")


def listed(place: Place) -> list[int]:
    store = place.store()
    try:
        return committed_steps(store)
    finally:
        store.close()
