"""What the service manager hears, and what it passes on."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.daemon import notify
from ckptd.daemon.notify import Given, Notifier, forget_manager, take_fds
from tests.fakes.jobs import Place, Process
from tests.fakes.service_manager import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServiceManager]:
    is_path = request.param == "path"
    address = f"{tmp_path}/n" if is_path else f"@ckptd-{uuid.uuid4().hex}"
    with ServiceManager(address) as fresh:
        yield fresh


def test_what_a_service_does_is_heard(manager: ServiceManager) -> None:
    notifier = Notifier(manager.address)
    notifier.ready()
    notifier.stopping()
    manager.wait_for(lambda: manager.said == ["READY=1", "STOPPING=1"])


def test_a_descriptor_is_stored_under_its_name_and_removed_by_it(manager: ServiceManager) -> None:
    notifier = Notifier(manager.address)
    out, into = os.pipe()
    notifier.store("a-1", out)
    manager.wait_for(lambda: manager.names() == ["a-1"])
    os.close(out)
    os.write(into, b"x")
    assert os.read(manager.fds()[0], 10) == b"x"
    notifier.remove("a-1")
    manager.wait_for(lambda: manager.names() == [])
    os.close(into)


def test_without_a_manager_nothing_is_said() -> None:
    notifier = Notifier("")
    assert not notifier.is_there
    notifier.ready()
    notifier.store("a", 10_000)
    notifier.remove("a")


def test_a_manager_that_is_gone_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for address in (f"{tmp_path}/gone", "vsock:2:1", "/" + 200 * "x"):
        caplog.clear()
        notifier = Notifier(address)
        notifier.ready()
        notifier.stopping()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_manager_that_reads_nothing_cannot_hold_a_daemon_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(notify, "NOTIFY_TIMEOUT_S", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(f"{tmp_path}/n")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as full:
            full.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    full.sendto(b"x", f"{tmp_path}/n")
        Notifier(f"{tmp_path}/n").ready()
    assert "does not hear" in caplog.text


# --- what it passes on ---------------------------------------------------------------------------


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Two descriptors, as if they were the first that may be passed: their number."""
    with open(os.devnull, "rb") as null:
        at = next(n for n in range(400, 10_000) if not is_open(n) and not is_open(n + 1))
        for fd in (at, at + 1):
            os.dup2(null.fileno(), fd)
    monkeypatch.setattr(notify, "_FIRST_FD", at)
    yield at
    for fd in (at, at + 1):
        os.close(fd)


def env(**changes: str) -> dict[str, str]:
    told = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    return {"HOME": "/", **told, **changes}


def test_descriptors_come_with_their_names_and_once(given: int) -> None:
    told = env()
    assert take_fds(told) == [Given("a", given), Given("b", given + 1)]
    assert told == {"HOME": "/"}
    assert take_fds(told) == []
    assert not os.get_inheritable(given)


@pytest.mark.parametrize(
    "changes",
    [
        {"LISTEN_PID": "1"},
        {"LISTEN_PID": ""},
        {"LISTEN_FDS": "0"},
        {"LISTEN_FDS": ""},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "99999999999"},
        {"LISTEN_FDS": "x"},
        {"LISTEN_FDNAMES": ""},
    ],
)
def test_what_is_another_process_or_makes_no_sense_is_left_alone(
    given: int, changes: dict[str, str]
) -> None:
    told = env(**changes)
    assert take_fds(told) == []
    assert told == {"HOME": "/"}


def test_a_descriptor_that_is_closed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_FIRST_FD", 10_000)
    assert take_fds(env()) == []


def test_a_process_that_is_no_service_forgets_the_manager() -> None:
    told = env(NOTIFY_SOCKET="/run/n")
    forget_manager(told)
    assert told == {"HOME": "/"}


@pytest.mark.system
def test_a_daemon_that_a_trainer_started_does_not_speak_for_it(place: Place) -> None:
    """The trainer is the service: were its daemon to say that it is ready, the job would look so."""
    with ServiceManager(f"@ckptd-{uuid.uuid4().hex}") as manager:
        env = place.env(NOTIFY_SOCKET=manager.address, CKPTD_LINGER_S="0.1")
        command = [sys.executable, "-m", "ckptd.daemon", place.socket()]
        starter = Process(command, env, place.base / "d.log")
        place.processes.append(starter)
        assert starter.wait() == 0
        (pid,) = place.pids()
        os.kill(pid, signal.SIGTERM)
        place.assert_empty()
        assert manager.said == []


@pytest.mark.system
def test_a_service_says_when_it_serves_and_when_it_ends(place: Place) -> None:
    with ServiceManager(f"@ckptd-{uuid.uuid4().hex}") as manager:
        daemon = manager.start(place)
        assert manager.said == ["READY=1"]
        assert daemon.end() == 0
        manager.wait_for(lambda: manager.said == ["READY=1", "STOPPING=1"])
