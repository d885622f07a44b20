"""A daemon that is a service and is killed with -9: the service manager kept the memory of its clients."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.daemon.record import REGION_BYTES, Record
from ckptd.model.keys import StepId
from tests.fakes.jobs import Place, Rank, Ranks, all_do, wait_until
from tests.fakes.s3_server import S3Server
from tests.fakes.service_manager import ServiceManager
from tests.fakes.trainers import assert_all_whole
from tests.system.test_memory import arenas_of, begin, hide_contents, kill, previous_of, save

pytestmark = pytest.mark.system

AWS = {"key": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"}


@pytest.fixture
def manager() -> Iterator[ServiceManager]:
    with ServiceManager(f"@ckptd-{uuid.uuid4().hex}") as fresh:
        yield fresh


def open_in(pid: int, what: str) -> int:
    """Count the descriptors of arenas, or of records, that a process has."""
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(fd))
    return sum(f"memfd:ckptd-{what}" in link for link in links)


def count_held(pid: int) -> tuple[int, int]:
    """Count the arenas and records that a process has open."""
    return open_in(pid, "arena"), open_in(pid, "record")


# --- the daemon and all trainers at once ---------------------------------------------------------


def test_d6_what_was_handed_off_outlives_daemon_and_trainers(
    place: Place, ranks: Ranks, manager: ServiceManager
) -> None:
    daemon = manager.start(place, failpoints="commit.put=hang@2")
    job = begin(place, ranks, [daemon.socket] * 2)
    save(job, 1)
    digests = save(job, 2, is_committed=False)
    daemon.kill()
    kill(job)
    assert len(manager.names()) == 4  # two of each rank
    hide_contents(place)
    daemon = manager.start(place)
    again = begin(place, ranks, [daemon.socket] * 2, seed=7)
    assert all_do(again, "resume") == [{"step": 2, "attempt": 1}] * 2
    assert all_do(again, "whence") == ["memory"] * 2
    assert all_do(again, "digest") == digests
    save(again, 3)
    # The line leads past a step that nobody committed.
    assert previous_of(place, StepId(2, 3)) == str(StepId(1, 1))


def test_p3_memory_of_the_dead_is_taken_over_across_a_kill_of_the_daemon(
    place: Place, ranks: Ranks, manager: ServiceManager
) -> None:
    daemon = manager.start(place)
    job = begin(place, ranks, [daemon.socket] * 2)
    save(job, 1)
    former = arenas_of(daemon.pid)
    for turn in range(2, 5):
        daemon.kill()
        kill(job)
        daemon = manager.start(place)
        assert arenas_of(daemon.pid) == former
        job = begin(place, ranks, [daemon.socket] * 2, seed=turn)
        assert all_do(job, "resume") == [{"step": turn - 1, "attempt": turn - 1}] * 2
        assert all_do(job, "whence") == ["memory"] * 2
        save(job, turn)
        assert arenas_of(daemon.pid) == former
        assert set().union(*(arenas_of(rank.pid) for rank in job)) == former
        assert len(manager.names()) == 4


def test_memory_of_trainers_that_die_after_the_daemon_was_restarted_is_taken_over(
    place: Place, ranks: Ranks, manager: ServiceManager
) -> None:
    daemon = manager.start(place)
    job = begin(place, ranks, [daemon.socket] * 2)
    digests = save(job, 1)
    former = arenas_of(daemon.pid)
    daemon.kill()
    daemon = manager.start(place)
    kill(job)  # none of them had spoken to the new one
    again = begin(place, ranks, [daemon.socket] * 2, seed=7)
    assert all_do(again, "resume") == [{"step": 1, "attempt": 1}] * 2
    assert all_do(again, "whence") == ["memory"] * 2
    assert all_do(again, "digest") == digests
    save(again, 2)
    assert arenas_of(daemon.pid) == former


# --- the daemon alone ----------------------------------------------------------------------------


def test_d6_trainers_that_live_hand_off_again_and_nothing_is_held_twice(
    place: Place, ranks: Ranks, manager: ServiceManager
) -> None:
    daemon = manager.start(place, failpoints="commit.put=hang@2")
    job = begin(place, ranks, [daemon.socket] * 2)
    save(job, 1)
    save(job, 2, is_committed=False)
    held, count, stored = arenas_of(daemon.pid), count_held(daemon.pid), manager.names()
    for step in range(2, 5):
        daemon.kill()
        daemon = manager.start(place, failpoints="commit.put=hang@2")
        assert all_do(job, "result", step=step) == [step] * 2
        save(job, step + 1, is_committed=False)
        assert manager.names() == stored
        assert arenas_of(daemon.pid) == held
        assert count_held(daemon.pid) == count
    all_do(job, "status", step=5)
    daemon.kill()
    daemon = manager.start(place)
    assert all_do(job, "result", step=5) == [5] * 2
    all_do(job, "close")
    store = place.store()
    assert assert_all_whole(store) == [1, 2, 3, 4, 5]
    store.close()


def test_a_stop_that_is_asked_for_keeps_what_trainers_left(
    place: Place, ranks: Ranks, manager: ServiceManager
) -> None:
    """As ``systemctl restart`` does; at ``systemctl stop`` the manager drops it by itself."""
    daemon = manager.start(place)
    job = begin(place, ranks, [daemon.socket])
    digests = save(job, 1)
    kill(job)
    assert daemon.end() == 0
    daemon = manager.start(place)
    again = begin(place, ranks, [daemon.socket], seed=7)
    assert again[0].do("resume") == {"step": 1, "attempt": 1}
    assert again[0].do("whence") == "memory"
    assert again[0].do("digest") == digests[0]


# --- what does not stay --------------------------------------------------------------------------


def test_p2_after_a_goodbye_the_manager_holds_nothing_of_ours(
    place: Place, ranks: Ranks, manager: ServiceManager
) -> None:
    daemon = manager.start(place)
    job = begin(place, ranks, [daemon.socket] * 2)
    save(job, 1)
    stored = manager.names()
    assert len(stored) == 4
    all_do(job, "close")
    manager.wait_for(lambda: manager.names() == [])
    for name in stored:
        assert f"FDNAME={name}" in manager.said
    assert manager.said.count("FDSTOREREMOVE=1") == 4
    wait_until(lambda: count_held(daemon.pid) == (0, 0), "all is let go")


def test_p2_crashes_of_trainers_leave_one_arena_of_each_rank(
    place: Place, ranks: Ranks, manager: ServiceManager
) -> None:
    daemon = manager.start(place)
    for turn in range(1, 5):
        job = begin(place, ranks, [daemon.socket], seed=turn)
        save(job, turn)
        kill(job)
    wait_until(lambda: len(manager.names()) == 2, "older ones have left")


# --- what is no memory of ours -------------------------------------------------------------------


def test_garbage_in_the_store_is_refused_and_the_daemon_serves(
    place: Place, ranks: Ranks, manager: ServiceManager
) -> None:
    daemon = manager.start(place)
    job = begin(place, ranks, [daemon.socket])
    digests = save(job, 1)
    kill(job)
    daemon.kill()
    good = manager.names()
    out, into = os.pipe()
    manager.put("ckptd-1-arena", out)
    manager.put("ckptd-1-record", os.dup(manager.fds("-record")[0]))
    manager.put("ckptd-2-arena", os.dup(manager.fds("-arena")[0]))
    manager.put("ckptd-2-record", os.memfd_create("x"))
    manager.put("ckptd-3-arena", os.memfd_create("x"))
    manager.put("stored", into)
    daemon = manager.start(place)
    manager.wait_for(lambda: manager.names() == sorted([*good, "stored"]))
    assert "Traceback" not in daemon.text
    assert daemon.text.count("is not used") == 3
    again = begin(place, ranks, [daemon.socket], seed=7)
    assert again[0].do("resume") == {"step": 1, "attempt": 1}
    assert again[0].do("whence") == "memory"
    assert again[0].do("digest") == digests[0]
    save(again, 2)


def test_r1_a_record_with_a_flipped_byte_sends_the_job_to_the_newest_checkpoint(
    place: Place, ranks: Ranks, manager: ServiceManager
) -> None:
    daemon = manager.start(place, failpoints="commit.put=hang@2")
    job = begin(place, ranks, [daemon.socket] * 2)
    digests = save(job, 1)
    save(job, 2, is_committed=False)
    daemon.kill()
    kill(job)
    record = manager.fds("-record")[0]
    slots = Record(record).read_shape().slots
    for slot in range(slots):
        at = (slot + 1) * REGION_BYTES + 50
        (byte,) = os.pread(record, 1, at)
        os.pwrite(record, bytes([byte ^ 1]), at)
    daemon = manager.start(place)
    again = begin(place, ranks, [daemon.socket] * 2, seed=7)
    assert all_do(again, "resume") == [{"step": 1, "attempt": 1}] * 2
    assert all_do(again, "digest") == digests
    save(again, 2)


# --- secrets -------------------------------------------------------------------------------------


def test_s7_the_manager_gets_no_secret(
    place: Place, ranks: Ranks, manager: ServiceManager, moto: S3Server, bucket: str
) -> None:
    options = {name: os.environ.get(var, f"CANARY{name}") for name, var in AWS.items()}
    settings = {
        "root": f"s3://{bucket}/run",
        "storage_options": {"endpoint_url": moto.url, **options},
    }

    def start(seed: int) -> list[Rank]:
        job = place.job(ranks, 1, CKPTD_SOCKET=place.socket())
        all_do(job, "open", **settings)
        all_do(job, "build", seed=seed)
        return job

    daemon = manager.start(place)
    digests = save(job := start(1), 1)
    written = b"".join(contents_of(fd) for fd in manager.fds("-record"))
    assert bucket.encode() in written
    assert not [secret for secret in options.values() if secret.encode() in written]
    daemon.kill()
    kill(job)
    manager.start(place)
    (again,) = start(7)
    assert again.do("resume") == {"step": 1, "attempt": 1}
    assert again.do("whence") == "memory"
    assert again.do("digest") == digests[0]


def contents_of(fd: int) -> bytes:
    """Return what is in a file, its holes left out."""
    found, at = b"", 0
    with contextlib.suppress(OSError):  # there is no more
        while True:
            at = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, at, os.SEEK_HOLE)
            found, at = found + os.pread(fd, end - at, at), end
    return found
