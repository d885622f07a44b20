"""A daemon made of a script: what is said to it is kept, what it answers is up to the test."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

from ckptd.errors import DaemonUnavailableError
from ckptd.shm.arena import Arena
from ckptd.wire import messages as say

WAIT_S = 20.0  # far beyond anything that happens; a test that waits so long has failed

Script = Callable[["FakePort", say.FromTrainer], None]


class FakePort:
    """One conversation. `script` runs in the sender's thread for each message that comes."""

    def __init__(self, daemon: FakeDaemon, wake_fd: int, script: Script) -> None:
        self.heard: list[say.FromTrainer] = []
        self.is_closed = False
        self.fds: list[int] = []
        self._daemon = daemon
        self._wake_fd = wake_fd
        self._script = script
        self._inbox: list[say.FromDaemon] = []
        self._is_broken = False

    def fileno(self) -> int | None:
        return None

    def send(self, message: say.FromTrainer, arena: Arena | None = None) -> None:
        with self._daemon.changed:
            if self._is_broken:
                raise DaemonUnavailableError("broken")
            assert (arena is not None) == isinstance(message, say.Arena)
            self.heard.append(message)
            self._daemon.changed.notify_all()
        self._script(self, message)

    def receive(self) -> list[say.FromDaemon]:
        with self._daemon.changed:
            found, self._inbox = self._inbox, []
            if not found and self._is_broken:
                raise DaemonUnavailableError("broken")
            return found

    def take_fd(self) -> int:
        return self.fds.pop(0)

    def close(self) -> None:
        with self._daemon.changed:
            self.is_closed = True
            self._daemon.changed.notify_all()

    def answer(self, *messages: say.FromDaemon) -> None:
        with self._daemon.changed:
            self._inbox += messages
        self._wake()

    def break_off(self) -> None:
        """End the conversation as a daemon does that dies."""
        with self._daemon.changed:
            self._is_broken = True
        self._wake()

    def kinds(self) -> list[str]:
        with self._daemon.changed:
            return [type(message).__name__ for message in self.heard]

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_fd, b"w")


class FakeDaemon:
    """Opens conversations: the n-th follows the n-th script, later ones the last."""

    def __init__(self, *scripts: Script) -> None:
        self.ports: list[FakePort] = []
        self.opened = 0
        self.is_absent = False
        self.changed = threading.Condition()  # guards all of a daemon and its ports
        self._scripts = scripts or (welcome,)

    def open(self, wake_fd: int) -> FakePort:
        with self.changed:
            self.opened += 1
            self.changed.notify_all()
            if self.is_absent:
                raise DaemonUnavailableError("there is none")
            script = self._scripts[min(len(self.ports), len(self._scripts) - 1)]
            self.ports.append(FakePort(self, wake_fd, script))
            return self.ports[-1]

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something said to this daemon makes `is_so` true."""
        with self.changed:
            assert self.changed.wait_for(is_so, WAIT_S)

    def until_heard(self, kind: type, count: int = 1, *, port: int = -1) -> list[say.FromTrainer]:
        """Wait until a conversation has heard `count` messages of one kind; return them."""

        def found() -> list[say.FromTrainer]:
            if not self.ports or len(self.ports) <= port:
                return []
            return [m for m in self.ports[port].heard if isinstance(m, kind)]

        self.until(lambda: len(found()) >= count)
        return found()


def welcome(port: FakePort, message: say.FromTrainer) -> None:
    """Answer a hello, and nothing else."""
    if isinstance(message, say.Hello):
        port.answer(say.Welcome())


def commit_all(port: FakePort, message: say.FromTrainer) -> None:
    """Answer as a daemon with an infinitely fast store."""
    welcome(port, message)
    if isinstance(message, say.Handoff):
        port.answer(written(message.step, message.sequence))
    if isinstance(message, (say.Handoff, say.Watch)):
        port.answer(finished(message.step, message.sequence))
    if isinstance(message, say.Settle):
        port.answer(say.Settled())


def written(step: int, sequence: int = 1) -> say.Written:
    return say.Written(step, sequence)


def finished(step: int, sequence: int = 1, state: str = "committed", kind: str = "",
             reason: str = "") -> say.Finished:  # fmt: skip
    return say.Finished(step, sequence, state, kind, reason, "", ())
