"""A service manager: hears what a daemon says, keeps its descriptors, and starts the next one.

What it does with descriptors is what systemd.exec(5) and sd_pid_notify_with_fds(3) say of systemd:
one of each file, removed by name, passed on from number 3 with their names.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from ckptd.daemon.notify import Given
from tests.fakes.jobs import _SERVE, Daemon, Place, wait_until

WAIT_S = 60.0  # far beyond anything that happens

_START = f"""
import os, sys
for at, fd in enumerate(map(int, sys.argv[3:]), 3):
    os.dup2(fd, at)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-c", {_SERVE!r}, *sys.argv[1:3]])
"""


class ServiceManager:
    """Listens at `address` (a path, or ``@name``) until the end of the block; its store holds `most`."""

    def __init__(self, address: str, most: int = 100) -> None:
        self.address = address
        self.most = most
        self.said: list[str] = []
        self._store: list[Given] = []
        self._changed = threading.Condition()  # guards the two above
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    # --- what it knows -------------------------------------------------------------------------

    def wait_for(self, is_so: Callable[[], Any]) -> None:
        with self._changed:
            assert self._changed.wait_for(is_so, WAIT_S), (self.said, self.names())

    def wait_said(self, text: str, count: int = 1) -> None:
        self.wait_for(lambda: self.said.count(text) >= count)

    def names(self) -> list[str]:
        return sorted(given.name for given in self._store)

    def fds(self, end: str = "") -> list[int]:
        """Return its own descriptors of what has a name with this end."""
        return [given.fd for given in self._store if given.name.endswith(end)]

    def passed(self) -> list[Given]:
        """Return all that it has as a new process would get it: new descriptors, the caller's."""
        return [Given(given.name, os.dup(given.fd)) for given in self._store]

    def put(self, name: str, fd: int) -> None:
        """Put something into the store, whatever it is, and own it."""
        with self._changed:
            self._store.append(Given(name, fd))
            self._changed.notify_all()

    def empty(self) -> None:
        """Drop all, as at ``systemctl stop``."""
        with self._changed:
            for given in self._store:
                os.close(given.fd)
            self._store = []

    # --- daemons -------------------------------------------------------------------------------

    def start(self, place: Place, name: str = "d", *, failpoints: str = "") -> Daemon:
        """Start a daemon as a service, with what is in the store; wait until it says it is ready."""
        ready = self.said.count("READY=1")
        told = {"NOTIFY_SOCKET": self.address, "CKPTD_DAEMON_FAILPOINTS": failpoints}
        with self._changed:
            fds = [fcntl.fcntl(given.fd, fcntl.F_DUPFD_CLOEXEC, 200) for given in self._store]
            if fds:
                told["LISTEN_FDS"] = str(len(fds))
                told["LISTEN_FDNAMES"] = ":".join(given.name for given in self._store)
        daemon = Daemon(
            [sys.executable, "-c", _START, place.socket(name), "service", *map(str, fds)],
            place.env(**told), place.base / f"{name}.log", place.socket(name), pass_fds=fds,
        )  # fmt: skip
        place.processes.append(daemon)
        for fd in fds:
            os.close(fd)
        is_up = lambda: self.said.count("READY=1") > ready or not daemon.is_running  # noqa: E731
        wait_until(is_up, f"{daemon.log} is ready")
        return daemon.wait_serving()

    # --- its thread ----------------------------------------------------------------------------

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._socket, 4096, 16)
            if data == b"END":
                return
            with self._changed:
                self._heard(data.decode().split("\n"), fds)
                self._changed.notify_all()

    def _heard(self, lines: list[str], fds: Iterable[int]) -> None:
        self.said += lines
        fields = dict(line.split("=", 1) for line in lines)
        name = fields.get("FDNAME", "stored")
        if "FDSTOREREMOVE" in fields:
            for given in [given for given in self._store if given.name == name]:
                os.close(given.fd)
                self._store.remove(given)
        for fd in fds:
            is_known = any(os.path.sameopenfile(fd, given.fd) for given in self._store)
            if "FDSTORE" in fields and not is_known and len(self._store) < self.most:
                self._store.append(Given(name, fd))
            else:
                os.close(fd)

    def __enter__(self) -> ServiceManager:  # noqa: PYI034 - Self is not in Python 3.10
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as talk:
            talk.sendto(b"END", self._socket.getsockname())
        self._thread.join()
        self._socket.close()
        self.empty()
        with contextlib.suppress(OSError):
            if not self.address.startswith("@"):
                Path(self.address).unlink()
