"""Trainers and daemons of a real job die, hang or are not there at all."""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import suppress

import pytest

from ckptd.wire.address import is_serving, socket_path
from tests.fakes.jobs import Place, Rank, Ranks, wait_until
from tests.fakes.trainers import assert_all_whole, committed_steps

pytestmark = pytest.mark.system


def path_of(place: Place) -> str:
    """Return the socket that trainers of this place use."""
    return socket_path(place.root, {}, place.env())


def start(place: Place, ranks: Ranks, **settings: object) -> Rank:
    """Give a rank that has trained, with a Checkpointer."""
    (rank,) = place.job(ranks, 1, CKPTD_LINGER_S="0.5", CKPTD_DRAIN_S="0.5")
    rank.do("build")
    rank.do("open", root=place.root, **settings)
    rank.do("train")
    return rank


def stop_daemons(place: Place) -> None:
    """End the daemons that trainers started, as an operator would; for those they wait a while."""
    for pid in place.pids():
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not place.pids(), "daemons end")


# --- the trainer dies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "newest"),
    [
        ("capture.begin", 1), ("capture.done", 1), ("link.send", 1), ("link.sent", 2),
        ("link.written", 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("action", ["kill", "abort"])
def test_d6_k1_k8_a_trainer_that_dies_loses_only_what_it_had_not_handed_off(
    place: Place, ranks: Ranks, point: str, action: str, newest: int
) -> None:
    rank = start(place, ranks)
    digests = {1: rank.do("digest")}
    rank.do("save", step=1)
    rank.do("result", step=1)
    rank.do("train")
    digests[2] = rank.do("digest")
    rank.do("arm", spec=f"{point}={action}")
    rank.order("save", step=2)
    rank.order("result", step=2)
    assert rank.wait() == (-signal.SIGKILL if action == "kill" else -signal.SIGABRT)
    again = start(place, ranks)
    assert again.do("resume") == {"step": newest, "attempt": 1}
    assert again.do("digest") == digests[newest]
    again.do("train")
    again.do("save", step=3)
    assert again.do("result", step=3) == 3
    again.do("close")
    store = place.store()
    assert assert_all_whole(store) == [*range(1, newest + 1), 3]
    store.close()
    assert place.temporary_files() == []


def test_d6_a_script_that_ends_without_close_has_handed_everything_off(
    place: Place, ranks: Ranks
) -> None:
    rank = start(place, ranks)
    rank.do("save", step=1)
    rank.do("train")
    rank.do("save", step=2)
    assert rank.end() == 0
    wait_until(lambda: not place.pids(), "the daemon finishes and leaves")
    store = place.store()
    assert assert_all_whole(store) == [1, 2]
    store.close()


# --- the daemon dies -----------------------------------------------------------------------------


def test_d6_a_dead_daemon_is_replaced_and_gets_the_same_snapshot(
    place: Place, ranks: Ranks
) -> None:
    rank = start(place, ranks)
    points = [
        "handoff.taken", "chunk.put", "chunks.sync", "rank.put", "rank.done", "commit.put",
        "commit.done",
    ]  # fmt: skip
    fds = 0
    for step, point in enumerate(points, 1):
        daemon = place.daemon(path_of(place), failpoints=f"{point}=kill")
        rank.do("train")
        rank.do("save", step=step)
        assert rank.do("result", step=step) == step
        assert daemon.wait() == -signal.SIGKILL
        stop_daemons(place)
        found = len(os.listdir(f"/proc/{rank.pid}/fd"))
        fds = fds or found
        assert found <= fds
    rank.do("close")
    store = place.store()
    assert assert_all_whole(store) == list(range(1, len(points) + 1))
    store.close()
    assert place.temporary_files() == []


def test_d6_both_die_and_the_next_job_goes_on(place: Place, ranks: Ranks) -> None:
    daemon = place.daemon(path_of(place), failpoints="commit.put=kill@2")
    rank = start(place, ranks)
    rank.do("save", step=1)
    rank.do("result", step=1)
    rank.do("train")
    digest = rank.do("digest")
    rank.do("arm", spec="link.written=kill")
    rank.order("save", step=2)
    assert rank.wait() == -signal.SIGKILL
    assert daemon.wait() == -signal.SIGKILL
    store = place.store()
    # The trainer may have seen its daemon die first, and another may have committed.
    assert committed_steps(store) in ([1], [1, 2])
    again = start(place, ranks)
    # All rank manifests are there and nothing else is lacking: resume commits the step.
    assert again.do("resume") == {"step": 2, "attempt": 1}
    assert again.do("digest") == digest
    wait_until(lambda: is_serving(path_of(place)), "a new daemon takes the dead one's socket")
    again.do("close")
    assert assert_all_whole(store) == [1, 2]
    store.close()


def test_d6_both_die_in_the_middle_of_a_chunk_and_the_older_step_comes_back(
    place: Place, ranks: Ranks
) -> None:
    place.daemon(path_of(place), CKPTD_DRAIN_S="0.5")
    rank = start(place, ranks)
    rank.do("save", step=1)
    rank.do("result", step=1)
    digest = rank.do("digest")
    stop_daemons(place)
    daemon = place.daemon(path_of(place), failpoints="store.link=stop")
    rank.do("train")
    rank.do("save", step=2)
    wait_until(daemon.is_stopped, "the daemon stops before a chunk has its name")
    rank.kill()
    daemon.kill()
    again = start(place, ranks)
    assert again.do("resume") == {"step": 1, "attempt": 1}
    assert again.do("digest") == digest
    wait_until(lambda: is_serving(path_of(place)), "a new daemon takes the dead one's socket")
    again.do("close")


# --- the daemon hangs, or is not there -----------------------------------------------------------


def test_p1_a_stopped_daemon_never_blocks_training_and_goes_on_later(
    place: Place, ranks: Ranks
) -> None:
    daemon = place.daemon(path_of(place))
    rank = start(place, ranks, slots=2, on_busy="skip", busy_timeout_s=0.2)
    rank.do("save", step=1)
    rank.do("result", step=1)
    daemon.send(signal.SIGSTOP)
    for step in (2, 3, 4, 5):
        rank.do("train")
        rank.do("save", step=step)
    assert rank.fail("result", step=2, timeout_s=0.1)["error"] == "SaveUnknownError"
    daemon.send(signal.SIGCONT)
    for step in (2, 3):
        assert rank.do("result", step=step) == step
    for step in (4, 5):
        assert rank.fail("result", step=step)["error"] == "SaveSkippedError"
    rank.do("save", step=6)
    assert rank.do("result", step=6) == 6
    rank.do("close")
    store = place.store()
    assert assert_all_whole(store) == [1, 2, 3, 6]
    store.close()


def test_p1_a_stopped_daemon_raises_where_saves_must_not_be_skipped(
    place: Place, ranks: Ranks
) -> None:
    daemon = place.daemon(path_of(place))
    rank = start(place, ranks, slots=1, busy_timeout_s=0.2)
    daemon.send(signal.SIGSTOP)
    rank.do("save", step=1)
    assert rank.fail("save", step=2)["error"] == "SlotsBusyError"
    rank.do("train")
    daemon.send(signal.SIGCONT)
    assert rank.do("result", step=1) == 1
    rank.do("save", step=3)
    assert rank.do("result", step=3) == 3
    rank.do("close")


def test_d11_p1_without_any_daemon_saves_return_and_the_failure_is_told_once(
    place: Place, ranks: Ranks
) -> None:
    (rank,) = place.job(ranks, 1, CKPTD_SOCKET=str(place.runtime / "nobody.sock"))
    rank.do("build")
    rank.do("open", root=place.root, busy_timeout_s=1.0)
    rank.do("save", step=1)
    wait_until(lambda: "no daemon took" in rank.text, "the save fails")
    assert rank.fail("save", step=2)["error"] == "DaemonUnavailableError"
    assert rank.fail("result", step=2)["error"] == "DaemonUnavailableError"
    daemon = place.daemon("nobody")
    rank.do("save", step=3)
    assert rank.do("result", step=3) == 3, "it is found once it is there"
    rank.do("close")
    assert daemon.end() == 0
    store = place.store()
    assert assert_all_whole(store) == [3]
    store.close()


def test_d11_a_daemon_that_cannot_start_fails_the_save_with_the_reason(
    place: Place, ranks: Ranks
) -> None:
    os.mkdir(path_of(place))  # something that is no socket
    (rank,) = place.job(ranks, 1)
    rank.do("build")
    rank.do("open", root=place.root, busy_timeout_s=0.3)
    rank.do("save", step=1)
    said = rank.fail("result", step=1)
    assert said["error"] == "DaemonUnavailableError"
    assert ".log" in rank.text
    os.rmdir(path_of(place))


def test_p6_a_daemon_that_is_told_to_go_is_replaced_without_a_lost_save(
    place: Place, ranks: Ranks
) -> None:
    rank = start(place, ranks)
    for step in range(1, 6):
        rank.do("train")
        rank.do("save", step=step)
        if step % 2:
            wait_until(lambda: is_serving(path_of(place)), "a daemon serves")
            for pid in place.pids():
                with suppress(ProcessLookupError):  # one that was told before is on its way out
                    os.kill(pid, signal.SIGTERM)
    for step in range(1, 6):
        assert rank.do("result", step=step) == step
    rank.do("close")
    store = place.store()
    assert assert_all_whole(store) == [1, 2, 3, 4, 5]
    store.close()


def test_d5_a_save_whose_daemon_died_after_the_commit_is_unknown_never_failed(
    place: Place, ranks: Ranks
) -> None:
    daemon = place.daemon("only", failpoints="commit.done=kill")
    (rank,) = place.job(ranks, 1, CKPTD_SOCKET=daemon.socket)  # nobody starts another one
    rank.do("build")
    rank.do("open", root=place.root, busy_timeout_s=0.5)
    rank.do("save", step=1)
    assert daemon.wait() == -signal.SIGKILL
    # Its part is known to be written, so it would be asked for much longer than busy_timeout_s.
    assert rank.fail("result", step=1, timeout_s=1.0)["error"] == "SaveUnknownError"
    place.daemon("only")
    assert rank.do("result", step=1) == 1
    rank.do("close")


def test_d5_a_save_whose_daemon_died_with_it_is_unknown_when_no_other_comes(
    place: Place, ranks: Ranks
) -> None:
    daemon = place.daemon("only", failpoints="chunk.put=kill")
    (rank,) = place.job(ranks, 1, CKPTD_SOCKET=daemon.socket)
    rank.do("build")
    rank.do("open", root=place.root, busy_timeout_s=2.0)
    rank.do("save", step=1)
    said = rank.fail("result", step=1)
    assert said["error"] == "SaveUnknownError"
    assert "gone" in said["text"]
    place.daemon("only")  # takes the place of the dead one's socket
    rank.do("save", step=2)
    assert rank.do("result", step=2) == 2
    rank.do("close")


def test_d6_a_script_that_ends_while_its_daemon_is_dead_hands_off_to_another(
    place: Place, ranks: Ranks
) -> None:
    rank = start(place, ranks)
    daemon = place.daemon(path_of(place), failpoints="chunk.put=kill")
    rank.do("save", step=1)
    assert daemon.wait() == -signal.SIGKILL
    assert rank.end() == 0
    wait_until(lambda: not place.pids(), "the other daemon finishes and leaves")
    store = place.store()
    assert assert_all_whole(store) == [1]
    store.close()


def test_p1_whoever_is_stopped_while_it_starts_a_daemon_does_not_keep_others(
    place: Place, ranks: Ranks
) -> None:
    lock = os.open(path_of(place) + ".start", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (rank,) = place.job(ranks, 1, CKPTD_LINGER_S="0.5")
    rank.do("build")
    rank.do("open", root=place.root, busy_timeout_s=0.5)
    rank.do("save", step=1)
    assert rank.fail("result", step=1)["error"] == "DaemonUnavailableError"
    os.close(lock)
    rank.do("save", step=2)
    assert rank.do("result", step=2) == 2
    rank.do("close")
