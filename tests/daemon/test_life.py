"""When a daemon comes, stays and goes, and what it costs meanwhile."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from ckptd.errors import DaemonUnavailableError
from ckptd.store.local import LocalStore
from ckptd.store.root import create_root
from ckptd.units import MIB
from ckptd.wire import messages as say
from ckptd.wire.address import is_serving
from tests.fakes.cycles import crash_trainers
from tests.fakes.jobs import Daemon, Place, Process, wait_until
from tests.fakes.trainers import FakeTrainer, assert_all_whole, committed_steps

pytestmark = pytest.mark.system

# Where a save is interrupted: from the handoff to the word about the commit.
POINTS = ("handoff.taken", "chunk.put", "chunks.sync", "rank.put", "rank.done", "commit.put",
          "commit.done")  # fmt: skip


def save(place: Place, name: str = "d", step: int = 10) -> FakeTrainer:
    """Commit a step through a daemon; the caller closes the trainer."""
    trainer = FakeTrainer(place.socket(name), place.root)
    trainer.connect().save(step, step // 10)
    assert trainer.outcome(step).state == "committed"
    return trainer


def report(place: Place, name: str = "d") -> dict:
    """Ask a daemon as `ckptd status --json` does."""
    done = place.run("status", "--json", CKPTD_SOCKET=place.socket(name))
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["daemons"]
    return found


# --- coming and going ----------------------------------------------------------------------------


def test_a_daemon_on_demand_leaves_after_the_last_goodbye_and_not_before(place: Place) -> None:
    daemon = place.daemon(is_on_demand=True)
    one = FakeTrainer(daemon.socket, place.root, rank=0, world_size=2)
    two = FakeTrainer(daemon.socket, place.root, rank=1, world_size=2)
    with one, two:
        for trainer in (one, two):
            trainer.connect().save(10, 1)
        one.goodbye()
        assert two.outcome(10).state == "committed"
        assert daemon.is_running
        two.goodbye()
        assert daemon.wait() == 0
    assert not os.path.exists(daemon.socket)


def test_p2_a_daemon_that_nobody_comes_to_leaves(place: Place) -> None:
    """The trainer that started it was killed before it said hello."""
    daemon = place.start_daemon(is_on_demand=True, CKPTD_LINGER_S="0.1")
    assert daemon.wait() == 0
    assert not os.path.exists(daemon.socket)


def test_d6_a_daemon_finishes_what_a_leaving_trainer_handed_off(place: Place) -> None:
    daemon = place.daemon(is_on_demand=True)
    with FakeTrainer(daemon.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        trainer.goodbye()
        assert daemon.wait() == 0
    store = place.store()
    assert assert_all_whole(store) == [10]
    store.close()


def test_a_daemon_stays_for_a_while_when_a_trainer_vanished(place: Place) -> None:
    daemon = place.daemon(is_on_demand=True, CKPTD_LINGER_S="600")
    save(place).close()
    with save(place, step=20) as again:  # the restarted worker finds it
        assert daemon.is_running
        again.goodbye()
    assert daemon.wait() == 0


def test_a_daemon_leaves_in_the_end_when_nobody_comes_back(place: Place) -> None:
    vanished = place.daemon("a", is_on_demand=True, CKPTD_LINGER_S="0.5")
    never = place.daemon("b", is_on_demand=True, CKPTD_LINGER_S="0.5")
    save(place, "a").close()
    assert vanished.wait() == 0
    assert never.wait() == 0
    assert place.sockets() == []


def test_two_calls_start_one_detached_daemon(place: Place) -> None:
    command = [sys.executable, "-m", "ckptd.daemon", place.socket()]
    env = place.env(CKPTD_LINGER_S="4")
    starters = [Process(command, env, place.base / "d.log") for _ in range(2)]
    place.processes += starters
    assert [starter.wait() for starter in starters] == [0, 0]
    assert is_serving(place.socket())
    assert len(place.pids()) == 1
    place.assert_empty()


# --- being told to go ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_p6_a_signal_lets_a_daemon_finish_and_exit_0(place: Place, number: signal.Signals) -> None:
    daemon = place.daemon(failpoints="chunk.put=stop")
    with FakeTrainer(daemon.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        wait_until(daemon.is_stopped, "the daemon stops in the middle of a save")
        daemon.send(number)
        daemon.send(signal.SIGCONT)
        assert trainer.outcome(10).state == "committed"
        trainer.goodbye()
        assert daemon.wait() == 0


@pytest.mark.parametrize("point", POINTS)
def test_e1_a_signal_in_the_middle_of_a_save_and_its_commit_loses_nothing(
    place: Place, point: str
) -> None:
    daemon = place.daemon(failpoints=f"{point}=stop")
    store = place.store()
    with FakeTrainer(daemon.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        wait_until(daemon.is_stopped, "the daemon stops there")
        trainer.hang_up()  # all die together; what was handed off is finished all the same
        daemon.send(signal.SIGTERM)
        daemon.send(signal.SIGCONT)
        assert daemon.wait() == 0
    assert assert_all_whole(store) == [10]
    store.close()
    assert place.temporary_files() == []


def test_p6_a_snapshot_that_comes_after_the_signal_is_committed_and_then_the_daemon_goes(
    place: Place,
) -> None:
    """A whole job step gets the signal at once; trainers save when they have heard of it."""
    daemon = place.daemon(CKPTD_DRAIN_S="600")
    store = place.store()
    with (
        FakeTrainer(daemon.socket, place.root) as trainer,
        FakeTrainer(daemon.socket, place.root, attempt=2) as stranger,
    ):
        trainer.connect().save(10, 1)
        assert trainer.outcome(10).state == "committed"
        daemon.send(signal.SIGTERM)
        wait_until(lambda: trainer.report()["is_draining"], "the daemon drains")
        with pytest.raises(DaemonUnavailableError):
            stranger.connect()
        assert "the daemon is stopping" in str(stranger.heard)
        trainer.save(20, 2, slot=1)
        assert trainer.outcome(20).state == "committed"
        assert daemon.is_running
        trainer.goodbye()
        assert daemon.wait() == 0
    assert assert_all_whole(store) == [10, 20]
    store.close()


def test_p6_a_root_that_does_not_open_cannot_keep_a_daemon(place: Place) -> None:
    """There is no work that could be left over, but a thread that will never come back."""
    daemon = place.daemon(failpoints="root.open=hang", CKPTD_DRAIN_S="0.3")
    with FakeTrainer(daemon.socket, place.root) as trainer:
        trainer.dial().say(trainer.hello)
        assert trainer.report()
        daemon.send(signal.SIGTERM)
        assert daemon.wait(20.0) == 6


def test_p6_a_daemon_does_not_wait_for_clients_beyond_its_deadline(place: Place) -> None:
    daemon = place.daemon(CKPTD_DRAIN_S="0.3")
    with save(place) as trainer:
        daemon.send(signal.SIGTERM)
        assert daemon.wait(20.0) == 0, "nothing was left"
        assert trainer.outcome(20) is None, "the connection has ended"


def test_e1_a_signal_while_a_daemon_starts_leaves_no_socket(place: Place) -> None:
    for _ in range(5):
        daemon = place.start_daemon()
        wait_until(lambda: os.path.exists(place.socket()), "its socket is there")
        daemon.send(signal.SIGTERM)
        assert daemon.wait() == 0
        assert place.sockets() == []


def test_a_daemon_that_is_not_to_linger_waits_for_its_first_client(place: Place) -> None:
    daemon = place.daemon(is_on_demand=True, CKPTD_LINGER_S="0")
    with save(place) as trainer:
        trainer.goodbye()
    assert daemon.wait() == 0


def test_e1_a_hang_up_of_the_terminal_is_ignored(place: Place) -> None:
    daemon = place.daemon()
    daemon.send(signal.SIGHUP)
    save(place).close()


def test_p6_a_drain_that_leaves_work_says_so_and_a_new_daemon_goes_on(place: Place) -> None:
    daemon = place.daemon(CKPTD_DRAIN_S="0.3")
    one = FakeTrainer(daemon.socket, place.root, rank=0, world_size=2)
    two = FakeTrainer(daemon.socket, place.root, rank=1, world_size=2)
    store = place.store()
    with one, two:
        one.connect().save(10, 1)
        assert one.report()["jobs"][0]["open"]
        daemon.send(signal.SIGTERM)
        assert daemon.wait() == 6
        assert committed_steps(store) == []
        place.daemon()
        one.outcome(10)
        one.connect().offer(10)
        two.connect().save(10, 1)
        assert one.outcome(10).state == two.outcome(10).state == "committed"
    store.close()


@pytest.mark.parametrize("point", ["chunk.put", "store.sync", "rank.put", "commit.put"])
def test_p6_a_disk_that_does_not_answer_cannot_keep_a_daemon(place: Place, point: str) -> None:
    daemon = place.daemon(failpoints=f"{point}=hang", CKPTD_DRAIN_S="0.3")
    store = place.store()
    with FakeTrainer(daemon.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        assert trainer.report()["jobs"][0]["open"]
        daemon.send(signal.SIGTERM)
        assert daemon.wait(20.0) == 6
        place.daemon()
        trainer.outcome(10)
        trainer.connect().offer(10)
        assert trainer.outcome(10).state == "committed"
    assert assert_all_whole(store) == [10]
    store.close()


def insist(daemon: Daemon) -> int:
    """Send SIGTERM until the daemon is gone: what comes right behind the first is its echo."""

    def is_gone() -> bool:
        if daemon.is_running:
            daemon.send(signal.SIGTERM)
        return not daemon.is_running

    wait_until(is_gone, "the daemon goes")
    return daemon.wait()


def test_e1_an_echo_of_the_first_signal_and_warnings_to_a_group_end_no_daemon(
    place: Place,
) -> None:
    daemon = place.daemon(CKPTD_DRAIN_S="600")
    store = place.store()
    with FakeTrainer(daemon.socket, place.root) as trainer:
        trainer.connect()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM):
            daemon.send(number)
        daemon.send(signal.SIGTERM)
        wait_until(lambda: trainer.report()["is_draining"], "the daemon drains")
        trainer.save(10, 1)
        assert trainer.outcome(10).state == "committed"
    assert daemon.wait() == 0
    assert assert_all_whole(store) == [10]
    store.close()


def test_p6_a_second_signal_ends_a_daemon_at_once(place: Place) -> None:
    daemon = place.daemon(CKPTD_DRAIN_S="600")
    with FakeTrainer(daemon.socket, place.root, world_size=2) as trainer:
        trainer.connect().save(10, 1)
        assert trainer.report()["jobs"][0]["open"]
        daemon.send(signal.SIGTERM)
        wait_until(lambda: trainer.report()["is_draining"], "the daemon drains")
        assert insist(daemon) == 128 + signal.SIGTERM
    place.daemon()  # nothing is in its way


@pytest.mark.parametrize("point", POINTS)
def test_p6_a_second_signal_in_the_middle_of_a_save_leaves_nothing_half(
    place: Place, point: str
) -> None:
    daemon = place.daemon(failpoints=f"{point}=hang", CKPTD_DRAIN_S="600")
    store = place.store()
    with FakeTrainer(daemon.socket, place.root) as trainer:
        trainer.connect().save(10, 1)
        daemon.send(signal.SIGTERM)
        wait_until(lambda: trainer.report()["is_draining"], "the daemon drains")
        assert insist(daemon) == 128 + signal.SIGTERM
        assert assert_all_whole(store) in ([], [10])
        place.daemon()
        trainer.outcome(10)
        trainer.connect().offer(10)
        assert trainer.outcome(10).state == "committed"
    assert assert_all_whole(store) == [10]
    store.close()


def test_p6_a_rank_that_comes_late_while_a_daemon_drains_completes_the_step(place: Place) -> None:
    daemon = place.daemon(CKPTD_DRAIN_S="600")
    one = FakeTrainer(daemon.socket, place.root, rank=0, world_size=2)
    two = FakeTrainer(daemon.socket, place.root, rank=1, world_size=2)
    with one, two:
        one.connect().save(10, 1)
        two.connect()
        assert one.report()["jobs"][0]["open"]
        daemon.send(signal.SIGTERM)
        wait_until(lambda: one.report()["is_draining"], "the daemon drains")
        two.save(10, 1)  # what belongs to an open step is still taken
        assert one.outcome(10).state == two.outcome(10).state == "committed"
        for trainer in (one, two):
            trainer.goodbye()
        assert daemon.wait() == 0


# --- what people see -----------------------------------------------------------------------------


def test_status_shows_what_a_daemon_does(place: Place) -> None:
    assert place.run("status", "--json").returncode == 6
    daemon = place.daemon()
    one = FakeTrainer(daemon.socket, place.root, rank=0, world_size=2)
    with one:
        one.connect().save(10, 1)
        one.wait_for(say.Written)
        found = report(place)
        assert found["pid"] == daemon.pid
        (job,) = found["jobs"]
        assert (job["ranks_here"], job["world_size"]) == ([0], 2)
        assert job["open"][0]["parts"] == {"0": "written"}
        one.forfeit(10, 1, "enough")
        one.outcome(10)
        assert report(place)["failed"] == 1
    text = place.run("status").stdout
    assert "rank 0 failed: enough" in text


def test_metrics_count_commits(place: Place) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place.daemon(CKPTD_METRICS=f"127.0.0.1:{port}")
    save(place).close()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    assert 'ckptd_steps_total{state="committed"} 1.0' in text


# --- what it costs -------------------------------------------------------------------------------


def test_a_daemon_is_small_and_quiet_once_it_has_nothing_to_do(place: Place) -> None:
    daemon = place.daemon(CKPTD_TRIM_S="0")
    shapes = {f"model.w{i}": (1024, 1920) for i in range(8)}
    with FakeTrainer(daemon.socket, place.root, shapes=shapes, chunk_bytes=32 * MIB) as trainer:
        assert sum(c.raw_bytes for c in trainer.packed.chunks) == 60 * MIB
        trainer.connect().save(10, 1)
        assert trainer.outcome(10).state == "committed"
        trainer.save(20, 2, slot=1)
        assert trainer.outcome(20).state == "committed"
        wait_until(lambda: daemon.resident_bytes() < 80 * MIB, "its memory is given back", 20.0)
        before_s = daemon.cpu_s()
        time.sleep(2.0)  # measured, not waited for
        assert daemon.cpu_s() - before_s < 0.05


@pytest.mark.parametrize("nice", [0, 7])
def test_a_daemon_steps_back_for_those_who_train(place: Place, nice: int) -> None:
    daemon = place.daemon(CKPTD_NICE=str(nice))
    save(place).close()  # now all its threads are there
    tasks = os.listdir(f"/proc/{daemon.pid}/task")
    assert len(tasks) > 3
    assert {os.getpriority(os.PRIO_PROCESS, int(task)) for task in tasks} == {nice}
    if platform.machine() == "x86_64":
        ask = ctypes.CDLL(None).syscall
        classes = {ask(252, 1, int(task)) >> 13 for task in tasks}  # ioprio_get(2)
        assert classes <= ({3} if nice else {0, 2})


def test_a_daemon_that_waits_for_a_rank_uses_no_processor_time(place: Place) -> None:
    daemon = place.daemon()
    with FakeTrainer(daemon.socket, place.root, world_size=2) as trainer:
        trainer.connect().save(10, 1)
        trainer.wait_for(say.Written)
        before_s = daemon.cpu_s()
        time.sleep(2.0)  # measured, not waited for
        assert daemon.cpu_s() - before_s < 0.2
        trainer.forfeit(10, 1)


def test_p2_a_thousand_trainers_that_vanish_leave_nothing(place: Place) -> None:
    daemon = place.daemon()
    save(place).close()
    assert arenas(daemon) == 1, "the newest of a rank is kept for who comes after it"
    fds = daemon.fd_count()
    for i in range(1000):
        with FakeTrainer(daemon.socket, place.root, shapes={"w": (8,)}, slots=1) as trainer:
            trainer.connect()
            if i % 10 == 0:
                trainer.save(20 + i, 2 + i)
    wait_until(lambda: arenas(daemon) == 1, "memory of vanished trainers goes")
    wait_until(lambda: daemon.fd_count() <= fds + 2, "descriptors go")
    assert place.temporary_files() == []
    save(place, step=100_000).close()


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.nightly)])
@pytest.mark.timeout(1800)
def test_p2_trainers_that_die_with_snapshots_in_memory_leave_nothing(
    place: Place, count: int
) -> None:
    """Real ones, killed at every point of their life: some inherit what another left, and die too."""
    *_, last = crash_trainers(place, count)
    assert (last.crashes, last.held.arenas, last.held.mapped_bytes) == (count, 0, 0)


def arenas(daemon: Process) -> int:
    return Path(f"/proc/{daemon.pid}/maps").read_text().count("memfd:ckptd-arena")


def test_a_daemon_serves_several_roots(place: Place) -> None:
    daemon = place.daemon()
    other = str(place.base / "other")
    with FakeTrainer(daemon.socket, other) as stranger:
        store = LocalStore(other)
        create_root(store)
        stranger.connect().save(10, 1)
        assert stranger.outcome(10).state == "committed"
        save(place).close()
        assert committed_steps(store) == [10]
        store.close()
