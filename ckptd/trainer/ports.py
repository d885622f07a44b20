"""The two ways to a daemon: a socket, or an engine on a thread of this process."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import Protocol, cast

from ckptd.engine import events as ev
from ckptd.engine.runner import Outlet, Runner
from ckptd.engine.state import Engine
from ckptd.errors import DaemonUnavailableError, ProtocolError
from ckptd.shm.arena import Arena
from ckptd.trainer.attempts import Attempt
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.options import Options
from ckptd.wire import messages as say
from ckptd.wire.address import connect, is_serving, socket_path
from ckptd.wire.channel import Channel

log = logging.getLogger("ckptd.trainer")

CONNECT_TIMEOUT_S = 5.0
FINISH_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 10.0
START_TIMEOUT_S = 60.0
TURN_TIMEOUT_S = 5.0
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Port(Protocol):
    """A conversation with a daemon. One thread uses it; `wake` descriptors are the caller's."""

    def fileno(self) -> int | None:
        """Return what becomes readable when there is something to receive; None: `wake` tells."""

    def send(self, message: say.FromTrainer, arena: Arena | None = None) -> None:
        """Send a message, an arena's memory beside it.

        Raises:
            HandoffError: the conversation is over; open another.
        """

    def receive(self) -> list[say.FromDaemon]:
        """Return what came, without waiting.

        Raises:
            HandoffError: the conversation is over; open another.
        """

    def take_fd(self) -> int:
        """Return the descriptor that came with a message; the caller owns it.

        Raises:
            HandoffError: there is none.
        """

    def close(self) -> None:
        """End the conversation. May be repeated."""


class SocketPort:
    """A daemon in another process."""

    def __init__(self, path: str, *, deadline_s: float) -> None:
        self._channel = Channel(connect(path, deadline_s=deadline_s), say.FromDaemon)
        self._channel.accept_large_frames()

    def fileno(self) -> int | None:
        """Return the socket."""
        return self._channel.fileno()

    def send(self, message: say.FromTrainer, arena: Arena | None = None) -> None:
        """Send within `SEND_TIMEOUT_S`."""
        fds = [arena.fileno()] if arena is not None else []
        self._channel.send(message, fds, deadline_s=SEND_TIMEOUT_S)

    def receive(self) -> list[say.FromDaemon]:
        """Return what the socket holds."""
        messages = self._channel.read_ready()
        if messages is None:
            raise DaemonUnavailableError("the daemon closed the connection")
        return cast("list[say.FromDaemon]", messages)

    def take_fd(self) -> int:
        """Return the oldest descriptor that came."""
        return self._channel.take_fd()

    def close(self) -> None:
        """Close the socket."""
        self._channel.close()


class _Lent:
    """The trainer's own arena as the engine in this process sees it: not the engine's to unmap."""

    def __init__(self, arena: Arena) -> None:
        self.slot = arena.slot

    def fileno(self) -> int:
        """Raise: it is not lent to anybody else."""
        raise ValueError("private memory has no descriptor")

    def trim(self) -> None:
        """Keep everything: it is the trainer's."""

    def close(self) -> None:
        """Keep everything: it is the trainer's."""


class ThreadPort:
    """The same engine on a thread of this process (``daemon=False``): it dies with the process."""

    def __init__(self, wake_fd: int) -> None:
        self._inbox: queue.SimpleQueue[say.FromDaemon] = queue.SimpleQueue()
        self._wake_fd = wake_fd
        self._runner = Runner(Engine(linger_s=0.0), Outlet(self._deliver, lambda _client: None))
        self._thread: threading.Thread | None = None

    def fileno(self) -> int | None:
        """Messages wake through the caller's descriptor."""
        return None

    def send(self, message: say.FromTrainer, arena: Arena | None = None) -> None:
        """Post the message to the engine."""
        if arena is not None and isinstance(message, say.Arena):
            self._runner.give_arena(1, message.arena, _Lent(arena))
        self._runner.post(ev.Said(1, message))
        if self._thread is None:  # only now: an engine without a client would leave at once
            self._thread = threading.Thread(
                target=self._runner.run, name="ckptd-engine", daemon=True
            )
            self._thread.start()

    def receive(self) -> list[say.FromDaemon]:
        """Return what the engine said."""
        messages = []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(self._inbox.get_nowait())
        return messages

    def take_fd(self) -> int:
        """Raise: this engine keeps nothing for others."""
        raise ProtocolError("an engine in this process lends no memory")

    def close(self) -> None:
        """Let the engine finish what it has, then end it; what takes too long dies with the process."""
        if self._thread is not None:
            self._runner.post(ev.Said(1, say.Goodbye()))
            self._thread.join(FINISH_TIMEOUT_S)
            self._thread = None

    def _deliver(self, _client: int, message: say.FromDaemon) -> None:
        self._inbox.put(message)
        with contextlib.suppress(OSError):
            os.write(self._wake_fd, b"w")


def hello_of(options: Options, meeting: Meeting, attempt: Attempt) -> say.Hello:
    """Return the first message of this rank."""
    return say.Hello(
        protocol=say.PROTOCOL, root=options.url, storage_options=options.storage_options,
        attempt=attempt.ordinal, token=attempt.token, rank=meeting.rank,
        world_size=meeting.world_size, compression=options.compression,
        commit_timeout_s=options.commit_timeout_s,
    )  # fmt: skip


def open_port(options: Options, wake_fd: int) -> Port:
    """Find or start the daemon that the options name; `wake_fd` is written to when it speaks.

    Raises:
        HandoffError: there is none, or it does not answer; it may later.
        ConfigError: its socket cannot be used.
    """
    if options.daemon is False:
        return ThreadPort(wake_fd)
    if isinstance(options.daemon, str):
        return SocketPort(options.daemon, deadline_s=CONNECT_TIMEOUT_S)
    path = socket_path(options.url, options.storage_options, os.environ)
    if not os.environ.get("CKPTD_SOCKET"):
        start_daemon(path, os.environ)
    return SocketPort(path, deadline_s=CONNECT_TIMEOUT_S)


def is_daemon_there(options: Options) -> bool:
    """Tell whether a daemon may still have something that an earlier attempt handed off.

    Where a trainer starts its own and none listens, there is none: it dies with what it had.

    Raises:
        ConfigError: its socket cannot be used.
    """
    if options.daemon is False:
        return False
    if isinstance(options.daemon, str) or os.environ.get("CKPTD_SOCKET"):
        return True
    return is_serving(socket_path(options.url, options.storage_options, os.environ))


# What lies in the folder that the job runs in must not take the place of modules.
_DAEMON = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
from ckptd.daemon.__main__ import start
sys.exit(start(sys.argv[1]))
"""


def start_daemon(path: str, env: Mapping[str, str]) -> None:
    """Start a detached daemon on `path` and wait until it listens; one process of a node does it.

    The daemon belongs to a session of its own and outlives this process; its log is
    ``<path>.log``.

    Raises:
        DaemonUnavailableError: it did not come up; the log says why.
    """
    with contextlib.ExitStack() as opened:
        try:
            lock = os.open(path + ".start", _FLAGS, 0o600)
            opened.callback(os.close, lock)
            log_fd = os.open(path + ".log", _FLAGS, 0o600)
            opened.callback(os.close, log_fd)
        except OSError as error:
            raise DaemonUnavailableError(f"no daemon can be started on {path}: {error}") from error
        _take_turn(lock, path)  # the others wait here and then find it running
        # Unlocked by name: a child that was forked meanwhile holds the same open file.
        opened.callback(fcntl.flock, lock, fcntl.LOCK_UN)
        if not is_serving(path):
            _run_daemon(path, log_fd, env)


def _take_turn(lock: int, path: str) -> None:
    """Lock, but not for ever: whoever holds it may be stopped."""
    deadline = time.monotonic() + TURN_TIMEOUT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise DaemonUnavailableError(
                    f"another process has been starting a daemon on {path} for "
                    f"{TURN_TIMEOUT_S:.0f} s: {error}"
                ) from error
        time.sleep(0.05)


def _run_daemon(path: str, log_fd: int, env: Mapping[str, str]) -> None:
    log.info("starting a daemon on %s", path)
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        pid = _spawn(path, log_fd, env)
    except OSError as error:
        raise DaemonUnavailableError(f"no daemon could be started: {error}") from error
    code = _wait(pid, deadline)
    if code is None:
        raise DaemonUnavailableError(
            f"the daemon did not listen within {START_TIMEOUT_S:.0f} s; its log is {path}.log"
        )
    if code != 0:
        raise DaemonUnavailableError(f"the daemon ended with code {code}; its log is {path}.log")


def _spawn(path: str, log_fd: int, env: Mapping[str, str]) -> int:
    # Not by `subprocess`: it waits for the end of a pipe that a data loader's worker, forked
    # meanwhile on another thread, holds for as long as it lives (seen).
    spawn = partial(
        os.posix_spawn, sys.executable, [sys.executable, "-c", _DAEMON, path], dict(env),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log_fd, 1),
            (os.POSIX_SPAWN_DUP2, log_fd, 2),
        ],
    )  # fmt: skip
    try:
        return spawn(setsid=True)  # at once: a signal to the job's group is not for the daemon
    except NotImplementedError:  # then it does so itself, a moment later
        return spawn()


def _wait(pid: int, deadline: float) -> int | None:
    """Return the exit code of a child, which comes back once its own child listens; None: not in time.

    No zombie is left.
    """
    delay_s = 0.002
    while True:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # the job ignores SIGCHLD: whoever connects next will see
            return 0
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            return None
        time.sleep(delay_s)
        delay_s = min(2 * delay_s, 0.05)
