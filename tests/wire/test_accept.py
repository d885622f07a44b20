from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.wire import address, peer
from ckptd.wire.accept import Door


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("s") / "d.sock")


@pytest.fixture
def door(path: str) -> Iterator[Door]:
    listener = address.listen(path)
    door = Door(listener.socket, {os.geteuid()})
    yield door
    door.close()
    address.unlisten(path, listener)


def is_ended(sock: socket.socket) -> bool:
    sock.settimeout(10)
    return sock.recv(1) == b""


def test_a_client_comes_in_and_then_there_is_none(door: Door, path: str) -> None:
    with address.connect(path, deadline_s=5):
        client = door.accept()
        assert client is not None
        assert client.gettimeout() == 0
        client.close()
        assert door.accept() is None


def test_s5_another_user_stays_outside(
    door: Door, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with address.connect(path, deadline_s=5) as sock:
        monkeypatch.setattr(peer, "_credentials", lambda sock: (1, 4242, 4242))
        assert door.accept() is None
        assert is_ended(sock)


def test_l6_without_descriptors_a_client_is_turned_away_and_the_next_one_served(
    door: Door, path: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with address.connect(path, deadline_s=5) as first, address.connect(path, deadline_s=5):
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            assert door.accept() is None
            assert is_ended(first)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client = door.accept()
        assert client is not None
        client.close()


def test_closing_twice_is_fine(door: Door) -> None:
    door.close()
    door.close()


def test_the_reserve_comes_back(door: Door, path: str) -> None:
    assert Path("/proc/self/fd").exists()
    door.close()
    with address.connect(path, deadline_s=5):
        client = door.accept()
        assert client is not None
        client.close()
    assert door._reserve is not None
