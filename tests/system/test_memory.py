"""Jobs that start again while daemons live: what was handed off comes back from memory."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from ckptd.model.keys import StepId
from ckptd.pipeline.catalog import read_manifest
from tests.fakes.jobs import Daemon, Place, Rank, Ranks, all_do, wait_until
from tests.fakes.trainers import assert_all_whole

pytestmark = pytest.mark.system


def begin(
    place: Place, ranks: Ranks, sockets: list[str], *, is_ddp: bool = True, seed: int = 1
) -> list[Rank]:
    """Start a job, one rank for each socket, that has a model."""
    job = place.job(ranks, len(sockets))
    for rank, socket in zip(job, sockets, strict=True):
        rank.do("setenv", CKPTD_SOCKET=socket)
    all_do(job, "open", root=place.root, slots=2)
    all_do(job, "build", is_ddp=is_ddp and len(job) > 1, seed=seed)
    return job


def save(job: list[Rank], step: int, *, is_committed: bool = True) -> list[str]:
    """Train and save; return what each rank's state is then."""
    all_do(job, "train")
    all_do(job, "save", step=step)
    if is_committed:
        all_do(job, "result", step=step)
    else:
        wait_until(
            lambda: set(all_do(job, "status", step=step)) == {"handed_off"}, "daemons have it"
        )
    return all_do(job, "digest")


def kill(job: list[Rank]) -> None:
    for rank in job:
        rank.kill()


def lose(node: Daemon) -> None:
    """Kill a daemon, and clear away what a node takes with it."""
    node.kill()
    Path(node.socket).unlink()
    Path(node.socket + ".lock").unlink(missing_ok=True)


def hide_contents(place: Place) -> None:
    """Take away all that a restore from the store would read, but for what was committed."""
    for folder in ("chunks", "ranks"):
        (Path(place.root) / folder).rename(Path(place.root) / f"hidden-{folder}")


def show_contents(place: Place) -> None:
    """Give it back."""
    for folder in ("chunks", "ranks"):
        (Path(place.root) / f"hidden-{folder}").rename(Path(place.root) / folder)


def arenas_of(pid: int) -> set[str]:
    """Return the identities of the arenas that a process has open."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        if os.path.lexists(path) and "ckptd-arena" in os.readlink(path):
            found.add(str(os.stat(path).st_ino))
    return found


def previous_of(place: Place, step: StepId) -> str | None:
    store = place.store()
    try:
        return read_manifest(store, step).previous
    finally:
        store.close()


@pytest.mark.parametrize("is_ddp", [True, False])
def test_workers_that_were_killed_come_back_from_memory_and_no_checkpoint_is_read(
    place: Place, ranks: Ranks, is_ddp: bool
) -> None:
    daemon = place.daemon()
    job = begin(place, ranks, [daemon.socket] * 2, is_ddp=is_ddp)
    save(job, 1)
    digests = save(job, 2)
    kill(job)
    hide_contents(place)
    again = begin(place, ranks, [daemon.socket] * 2, is_ddp=is_ddp, seed=7)
    assert all_do(again, "resume") == [{"step": 2, "attempt": 1}] * 2
    assert all_do(again, "whence") == ["memory"] * 2
    assert all_do(again, "digest") == digests
    show_contents(place)
    save(again, 3)
    assert previous_of(place, StepId(2, 3)) == str(StepId(1, 2))


def test_p3_a_restarted_trainer_takes_the_arena_of_the_dead_one_over(
    place: Place, ranks: Ranks
) -> None:
    daemon = place.daemon()
    job = begin(place, ranks, [daemon.socket] * 2)
    save(job, 1)
    former = arenas_of(daemon.pid)
    for turn in range(2, 5):
        kill(job)
        job = begin(place, ranks, [daemon.socket] * 2, seed=turn)
        assert all_do(job, "resume") == [{"step": turn - 1, "attempt": turn - 1}] * 2
        save(job, turn)
        assert arenas_of(daemon.pid) == former
        assert set().union(*(arenas_of(rank.pid) for rank in job)) == former


def test_a_step_that_was_not_committed_yet_comes_back_from_memory(
    place: Place, ranks: Ranks
) -> None:
    daemon = place.daemon(failpoints="commit.put=hang@2")
    job = begin(place, ranks, [daemon.socket] * 2)
    save(job, 1)
    digests = save(job, 2, is_committed=False)
    kill(job)
    again = begin(place, ranks, [daemon.socket] * 2, seed=7)
    assert all_do(again, "resume") == [{"step": 2, "attempt": 1}] * 2
    assert all_do(again, "whence") == ["memory"] * 2
    assert all_do(again, "digest") == digests
    save(again, 3)
    # The line leads past a step that nobody committed.
    assert previous_of(place, StepId(2, 3)) == str(StepId(1, 1))
    all_do(again, "close")
    lose(daemon)
    store = place.store()
    assert assert_all_whole(store) == [1, 3]
    store.close()


def test_what_only_another_node_holds_travels_to_whoever_wants_it(
    place: Place, ranks: Ranks
) -> None:
    nodes = [place.daemon("a"), place.daemon("b")]
    job = begin(place, ranks, [node.socket for node in nodes])
    save(job, 1)
    digests = save(job, 2)
    kill(job)
    hide_contents(place)
    # Ranks are not stable: what was rank 0's node is rank 1's now.
    again = begin(place, ranks, [node.socket for node in reversed(nodes)], seed=7)
    assert all_do(again, "resume") == [{"step": 2, "attempt": 1}] * 2
    assert all_do(again, "whence") == ["memory"] * 2
    assert all_do(again, "digest") == digests


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_r3_another_number_of_workers_comes_back_from_memory(
    place: Place, ranks: Ranks, before: int, after: int
) -> None:
    nodes = [place.daemon("a"), place.daemon("b")]
    job = begin(place, ranks, [nodes[i % 2].socket for i in range(before)])
    for rank in job:
        rank.do("take", name="rng")  # which another number of ranks would have to inherit
    save(job, 1)
    digest = save(job, 2)[0]
    kill(job)
    hide_contents(place)
    again = begin(place, ranks, [nodes[i % 2].socket for i in range(after)], seed=7)
    for rank in again:
        rank.do("take", name="rng")
    if after < 2 <= before:  # nobody is left on the other node: its part is a hole
        return
    assert all_do(again, "resume") == [{"step": 2, "attempt": 1}] * after
    assert all_do(again, "whence") == ["memory"] * after
    assert all_do(again, "digest") == [digest] * after


def test_a_hole_sends_the_job_to_the_newest_checkpoint(place: Place, ranks: Ranks) -> None:
    nodes = [place.daemon("a"), place.daemon("b", failpoints="rank.put=hang@2")]
    job = begin(place, ranks, [node.socket for node in nodes])
    digests = save(job, 1)
    save(job, 2, is_committed=False)
    kill(job)
    lose(nodes[1])  # before it stored its part
    spare = place.daemon("c")
    again = begin(place, ranks, [nodes[0].socket, spare.socket], seed=7)
    assert all_do(again, "resume") == [{"step": 1, "attempt": 1}] * 2
    assert all_do(again, "digest") == digests
    kill(again)
    lose(nodes[0])


def test_of_a_committed_step_the_store_has_what_memory_lacks(place: Place, ranks: Ranks) -> None:
    nodes = [place.daemon("a"), place.daemon("b")]
    job = begin(place, ranks, [node.socket for node in nodes])
    digests = save(job, 1)
    kill(job)
    lose(nodes[1])
    spare = place.daemon("c")
    again = begin(place, ranks, [nodes[0].socket, spare.socket], seed=7)
    assert all_do(again, "resume") == [{"step": 1, "attempt": 1}] * 2
    assert all_do(again, "whence") == ["memory"] * 2
    assert all_do(again, "digest") == digests


def test_d6_a_step_that_lacks_only_its_commit_goes_before_an_older_one_in_memory(
    place: Place, ranks: Ranks
) -> None:
    nodes = [place.daemon("a", failpoints="commit.put=kill@2"), place.daemon("b")]
    job = begin(place, ranks, [node.socket for node in nodes])
    save(job, 1)
    all_do(job, "train")
    digests = all_do(job, "digest")
    all_do(job, "save", step=2)
    assert nodes[0].wait() == -signal.SIGKILL  # both have written their part
    kill(job)
    place.daemon("a")
    # The other node has its part of both steps: of the older one the store has the rest.
    again = begin(place, ranks, [node.socket for node in nodes], seed=7)
    assert all_do(again, "resume") == [{"step": 2, "attempt": 1}] * 2
    assert all_do(again, "digest") == digests


def test_a_newer_checkpoint_wins_against_what_a_daemon_held(place: Place, ranks: Ranks) -> None:
    nodes = [place.daemon("a"), place.daemon("b")]
    save(job := begin(place, ranks, [nodes[0].socket]), 1)
    kill(job)
    second = begin(place, ranks, [nodes[1].socket], seed=7)
    assert second[0].do("resume") == {"step": 1, "attempt": 1}
    digests = save(second, 2)
    second[0].do("close")
    third = begin(place, ranks, [nodes[0].socket], seed=8)
    assert third[0].do("resume") == {"step": 2, "attempt": 2}
    assert third[0].do("whence") == "store"
    assert third[0].do("digest") == digests[0]


def test_who_leaves_by_an_error_comes_back_from_memory(place: Place, ranks: Ranks) -> None:
    daemon = place.daemon()
    job = begin(place, ranks, [daemon.socket])
    digests = save(job, 1)
    job[0].do("abandon")
    assert "kept in memory" in place.run("status", "--socket", daemon.socket).stdout
    again = begin(place, ranks, [daemon.socket], seed=7)
    assert again[0].do("resume") == {"step": 1, "attempt": 1}
    assert again[0].do("whence") == "memory"
    assert all_do(again, "digest") == digests


def test_who_says_goodbye_for_good_leaves_nothing_in_memory(place: Place, ranks: Ranks) -> None:
    daemon: Daemon = place.daemon()
    job = begin(place, ranks, [daemon.socket])
    save(job, 1)
    job[0].do("close")
    again = begin(place, ranks, [daemon.socket], seed=7)
    assert again[0].do("resume") == {"step": 1, "attempt": 1}
    assert again[0].do("whence") == "store"
    assert not re.search(r"Traceback", daemon.text)
