"""Whatever comes through the socket, the daemon serves everyone else and loses no descriptor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress

import pytest

from ckptd.units import MIB
from ckptd.wire import frames
from ckptd.wire import messages as say
from tests.fakes.attackers import ATTACKS, Attacker, half_a_frame, half_a_large_frame, hello
from tests.fakes.jobs import Daemon, Place, state_of, wait_until
from tests.fakes.trainers import FakeTrainer, assert_all_whole

pytestmark = pytest.mark.system


@pytest.fixture
def daemon(place: Place) -> Daemon:
    return place.daemon()


def test_s6_p2_hostile_clients_neither_stop_the_daemon_nor_leave_a_descriptor(
    place: Place, daemon: Daemon
) -> None:
    with FakeTrainer(daemon.socket, place.root) as good, ExitStack() as lazy:
        good.connect().save(10, 1)
        assert good.outcome(10).state == "committed"
        fds, resident = daemon.fd_count(), daemon.resident_bytes()
        for turn in range(200):
            attack = ATTACKS[turn % len(ATTACKS)]
            with Attacker(daemon, place.root) as client:
                try:
                    attack(client)
                except (TimeoutError, AssertionError) as error:
                    raise AssertionError(f"{attack.__name__} was not refused") from error
                if attack in (half_a_frame, half_a_large_frame):
                    lazy.enter_context(client.socket.dup())  # stays, and owes the rest
            if turn % 20 == 19:
                step = 10 * (turn // 20) + 20
                good.save(step, step // 10)
                assert good.outcome(step).state == "committed"
        lazy.close()
        # But for the memory (two each) of the last one that had handed something off: it is kept a while.
        wait_until(lambda: daemon.fd_count() <= fds + 2, "descriptors are closed", 20.0)
        assert daemon.resident_bytes() < resident + 40 * MIB
        assert daemon.is_running
        assert "Traceback" not in daemon.text
    store = place.store()
    assert assert_all_whole(store) == list(range(10, 120, 10))
    store.close()


def test_m5_a_client_that_drips_does_not_keep_others_waiting(place: Place, daemon: Daemon) -> None:
    with FakeTrainer(daemon.socket, place.root) as good, ExitStack() as slow:
        for _ in range(20):
            client = slow.enter_context(Attacker(daemon, place.root))
            client.send(frames.encode(hello(place.root))[:9])
        good.connect().save(10, 1)
        assert good.outcome(10).state == "committed"


def test_s6_a_client_that_never_reads_is_dropped_and_others_are_served(
    place: Place, daemon: Daemon
) -> None:
    with FakeTrainer(daemon.socket, place.root) as good, Attacker(daemon, place.root) as deaf:
        deaf.enter()
        with suppress(OSError):  # dropped
            while True:
                deaf.socket.sendall(frames.encode(say.Ask()) * 1000)
        good.connect().save(10, 1)
        assert good.outcome(10).state == "committed"


def is_at_end(client: Attacker) -> bool:
    """Tell whether the daemon has closed this connection."""
    try:
        return client.socket.recv(1) == b""
    except BlockingIOError:
        return False


def test_l6_clients_beyond_the_descriptor_limit_are_turned_away_and_come_back_later(
    place: Place,
) -> None:
    daemon = place.daemon()
    limit = daemon.fd_count() + 12
    subprocess.run(
        ["prlimit", f"--pid={daemon.pid}", f"--nofile={limit}:{limit}"], check=True
    )  # fmt: skip
    with ExitStack() as crowd:
        clients = [crowd.enter_context(Attacker(daemon, place.root)) for _ in range(40)]
        for client in clients:
            client.socket.setblocking(False)
        wait_until(lambda: any(map(is_at_end, clients)), "somebody is turned away")
        assert not all(map(is_at_end, clients)), "there is room for some"
        assert "too slow" not in daemon.text, "they were closed at once, not for their silence"
    with FakeTrainer(daemon.socket, place.root) as good:
        wait_until(lambda: daemon.fd_count() < limit - 8, "the crowd is gone")
        good.connect().save(10, 1)
        assert good.outcome(10).state == "committed"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a second user")
def test_s5_another_users_process_is_shut_out_before_a_byte_is_read(
    place: Place, daemon: Daemon
) -> None:
    code = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    print("shut"); sys.exit()
sock.settimeout(20)
try:
    sock.sendall(b"\\0\\0\\0\\x01x")
    print("closed" if not sock.recv(10) else "served")
except OSError:
    print("closed")
"""

    def visit() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, daemon.socket], capture_output=True, text=True,
            timeout=60, check=True, env=place.env(),
        )  # fmt: skip
        return done.stdout.strip()

    assert visit() == "shut"  # the directory
    os.chmod(place.base, 0o755)
    os.chmod(place.runtime, 0o755)
    os.chmod(daemon.socket, 0o777)
    assert visit() == "closed"  # the uid
    os.chmod(place.runtime, 0o700)
    assert "Traceback" not in daemon.text


def test_k8_a_trainer_that_aborts_while_it_hands_off_changes_nothing(
    place: Place, daemon: Daemon
) -> None:
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from ckptd.wire import frames
from tests.fakes.trainers import FakeTrainer
trainer = FakeTrainer(sys.argv[2], sys.argv[3])
trainer.connect()
trainer.fill(10, 1)
whole = frames.encode(trainer.handoffs[10])
trainer._channel._socket.send(whole[: len(whole) // 2])
os.abort()
"""
    process = subprocess.run(
        [sys.executable, "-c", code, place.env()["PYTHONPATH"], daemon.socket, place.root],
        env=place.env(), cwd="/", check=False, timeout=60, preexec_fn=_no_core,
    )  # fmt: skip
    assert process.returncode == -signal.SIGABRT
    with FakeTrainer(daemon.socket, place.root, attempt=2) as next_one:
        next_one.connect().save(20, 1)
        assert next_one.outcome(20).state == "committed"
    store = place.store()
    assert assert_all_whole(store) == [20]
    store.close()
    assert state_of(daemon.pid) != "Z"


def _no_core() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
