"""The socket side by itself, with an engine that does not keep up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckptd.daemon.server import MAX_WAITING, Server
from ckptd.engine import events as ev
from ckptd.shm.arena import Arena
from ckptd.wire import frames
from ckptd.wire import messages as say
from ckptd.wire.address import connect, listen, unlisten
from tests.fakes.jobs import wait_until


class SlowRunner:
    """Takes events and handles none."""

    def __init__(self) -> None:
        self.events: list[ev.Event] = []
        self.arenas: list[Arena] = []

    def give_arena(self, client: int, number: int, arena: Arena) -> None:
        self.arenas.append(arena)

    def post(self, event: ev.Event) -> None:
        self.events.append(event)


def send_for_ever(client: socket.socket, data: bytes) -> None:
    while True:
        client.sendall(data)


def test_s6_a_client_that_says_more_than_the_engine_takes_is_made_to_wait(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = listen(path)
    runner = SlowRunner()
    server = Server(listener.socket, {os.geteuid()})
    thread = threading.Thread(target=server.serve, args=[runner])
    thread.start()
    flood = frames.encode(say.Ask()) * 1000
    with connect(path, deadline_s=10.0) as client:
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            send_for_ever(client, flood)
        posted = len(runner.events)
        assert posted >= MAX_WAITING
        for _ in range(posted):
            server.outlet.handled(1)  # the engine catches up
        client.settimeout(20.0)
        client.sendall(flood)
    server.stop()
    thread.join()
    unlisten(path, listener)
    assert len(runner.events) > posted


def test_messages_before_an_arena_may_come_in_the_same_read(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = listen(path)
    runner = SlowRunner()
    server = Server(listener.socket, {os.geteuid()})
    with connect(path, deadline_s=10.0) as client, Arena.create(1, 8192) as arena:
        client.sendall(frames.encode(say.Watch(1, 1, None)))
        client.sendall(frames.encode(say.Watch(2, 2, None)))
        socket.send_fds(client, [frames.encode(say.Arena(1, 1, 8192))], [arena.fileno()])
        thread = threading.Thread(target=server.serve, args=[runner])
        thread.start()
        wait_until(lambda: len(runner.events) == 3, "all three are heard")
        assert len(runner.arenas) == 1
        runner.arenas.pop().close()
    server.stop()
    thread.join()
    unlisten(path, listener)


def test_p6_a_signal_that_another_thread_gets_wakes_the_one_that_serves(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = listen(path)
    runner = SlowRunner()
    server = Server(listener.socket, {os.geteuid()})
    has_ended = threading.Event()
    in_time: list[bool] = []

    def disturb() -> None:
        with connect(path, deadline_s=10.0) as client:
            client.sendall(frames.encode(say.Ask()))
            wait_until(lambda: runner.events, "it serves")
        wait_until(lambda: runner.events[-1] == ev.Gone(1, is_dead=False), "it waits again")
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        in_time.append(has_ended.wait(20.0))
        if not in_time[0]:
            server.stop()

    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: server.stop())
    signal.set_wakeup_fd(server.wake_fd(), warn_on_full_buffer=False)
    thread = threading.Thread(target=disturb)
    thread.start()
    server.serve(runner)
    has_ended.set()
    thread.join()
    signal.signal(signal.SIGUSR1, before)
    unlisten(path, listener)
    assert in_time == [True]
    assert signal.set_wakeup_fd(-1) == -1, "its descriptor is closed"


def test_the_death_of_a_process_without_a_connection_is_told_and_its_number_stays_free(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "s")
    listener = listen(path)
    runner = SlowRunner()
    server = Server(listener.socket, {os.geteuid()})
    dies = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    server.follow(3, os.pidfd_open(dies.pid))
    server.follow(7, os.pidfd_open(os.getpid()))
    server.follow(5, None)
    thread = threading.Thread(target=server.serve, args=[runner])
    thread.start()
    with connect(path, deadline_s=10.0) as client:
        client.sendall(frames.encode(say.Ask()))
        wait_until(lambda: runner.events, "the client is heard")
        assert runner.events.pop() == ev.Said(8, say.Ask(), os.getpid())
        dies.communicate()
        wait_until(lambda: runner.events, "the death is heard")
        assert runner.events.pop() == ev.Gone(3, is_dead=True)
    fds = len(os.listdir("/proc/self/fd"))
    server.stop()
    thread.join()
    assert len(os.listdir("/proc/self/fd")) < fds - 1
    unlisten(path, listener)
