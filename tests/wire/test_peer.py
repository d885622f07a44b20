from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
import sys
from typing import Any

import pytest

from ckptd.errors import ProtocolError
from ckptd.wire import peer

CHILD = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); sys.stdin.read()
"""


class FakeSocket:
    """Answers getsockopt with what a test sets."""

    def __init__(self, answers: dict[int, Any]) -> None:
        self._answers = answers

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        answer = self._answers[option]
        if isinstance(answer, OSError):
            raise answer
        return answer


def credentials(pid: int, uid: int) -> bytes:
    return struct.pack("iII", pid, uid, 0)


def test_the_kernel_says_who_is_there() -> None:
    a, b = socket.socketpair()
    with a, b:
        assert peer.peer_uid(a) == os.geteuid()
        assert peer.peer_pid(a) == os.getpid()
        assert peer.check_peer(a, {os.geteuid()}) == os.geteuid()


def test_s5_m6_another_user_is_refused() -> None:
    stranger: Any = FakeSocket({socket.SO_PEERCRED: credentials(5, 4242)})
    with pytest.raises(ProtocolError, match="4242"):
        peer.check_peer(stranger, {0, 1000})


def test_s5_m6_a_peer_that_the_kernel_does_not_name_is_refused() -> None:
    silent: Any = FakeSocket({socket.SO_PEERCRED: OSError(errno.ENOTCONN, "not connected")})
    with pytest.raises(ProtocolError):
        peer.check_peer(silent, {0})
    assert peer.peer_pid(silent) == 0


def test_m6_a_pidfd_tells_when_the_peer_dies(tmp_path: Any) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        path = str(tmp_path / "s")
        listener.bind(path)
        listener.listen()
        child = subprocess.Popen([sys.executable, "-c", CHILD, path], stdin=subprocess.PIPE)
        client, _ = listener.accept()
        with client:
            fd = peer.peer_pidfd(client)
            assert fd is not None
            assert peer.peer_pid(client) == child.pid
            assert select.select([fd], [], [], 0) == ([], [], [])
            child.kill()
            child.communicate()
            assert select.select([fd], [], [], 10)[0] == [fd]
            os.close(fd)


def test_an_old_kernel_gets_a_pidfd_by_id() -> None:
    old: Any = FakeSocket(
        {77: OSError(errno.ENOPROTOOPT, "no"), socket.SO_PEERCRED: credentials(os.getpid(), 0)}
    )
    fd = peer.peer_pidfd(old)
    assert fd is not None
    os.close(fd)


@pytest.mark.parametrize("number", [errno.ESRCH, errno.EINVAL, errno.EMFILE])
def test_m6_no_pidfd_of_a_dead_peer_is_taken_by_id(number: int) -> None:
    dead: Any = FakeSocket(
        {77: OSError(number, "no"), socket.SO_PEERCRED: credentials(os.getpid(), 0)}
    )
    assert peer.peer_pidfd(dead) is None


def test_a_peer_without_an_id_has_no_pidfd() -> None:
    outside: Any = FakeSocket(
        {77: OSError(errno.ENOPROTOOPT, "no"), socket.SO_PEERCRED: credentials(0, 0)}
    )
    assert peer.peer_pidfd(outside) is None
