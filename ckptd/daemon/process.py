"""A daemon's process: its log, its signals, its life from lock to exit."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, MutableMapping
from types import FrameType

from ckptd import failpoints
from ckptd.config import DaemonConfig
from ckptd.daemon.keeping import Keeping, TakenBack
from ckptd.daemon.metrics import serve_metrics
from ckptd.daemon.notify import Notifier, take_fds
from ckptd.daemon.priority import step_back
from ckptd.daemon.server import Server
from ckptd.engine import events as ev
from ckptd.engine.lifetime import EXIT_UNFINISHED
from ckptd.engine.runner import Runner
from ckptd.engine.state import Engine
from ckptd.errors import AlreadyServingError, CkptdError
from ckptd.wire.address import Listener, listen, unlisten

log = logging.getLogger("ckptd.daemon")

EXIT_CRASHED = 1
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_ECHO_S = 0.5
_OVERDUE_S = 1.0
# What a scheduler sends to every process of a job is a warning to the trainers.
_FOR_OTHERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run_daemon(
    config: DaemonConfig, env: MutableMapping[str, str], *, is_detached: bool = False
) -> int:
    """Serve on `config.socket` until told or no longer needed; return the exit code.

    To be called on a process's main thread: it takes SIGTERM and SIGINT and ignores SIGHUP, SIGUSR1
    and SIGUSR2, which the whole group gets when a terminal closes or a job is warned. The first signal
    lets it drain: clients that are connected are served on, since they were told too and their last
    snapshot is yet to come, until they have left and all is written, for `drain_s` at most. One that
    comes `_ECHO_S` later or more ends the process at once.
    With `is_detached` the calling process returns 0 once a child of it listens, and the child
    serves. A service manager that `env` names is told, and keeps the memory of clients; what tells of
    its descriptors is taken out of `env`.

    Raises:
        AlreadyServingError: another daemon serves there.
        ConfigError: the socket's place cannot be used.
    """
    failpoints.arm(env.get("CKPTD_DAEMON_FAILPOINTS", ""))
    for number in _FOR_OTHERS:
        signal.signal(number, signal.SIG_IGN)
    # From before there is a socket to leave behind until `_take_signals`, a signal waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        listener = listen(config.socket)
    except BaseException as error:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        if is_detached and isinstance(error, AlreadyServingError):
            return 0
        raise
    # No thread runs yet, so a fork is safe; the lock goes along with the descriptor.
    if is_detached and os.fork() != 0:
        os._exit(0)
    try:
        return _serve(config, listener, env)
    finally:
        unlisten(config.socket, listener)


def _serve(config: DaemonConfig, listener: Listener, env: MutableMapping[str, str]) -> int:
    step_back(config.nice)
    engine = Engine(linger_s=config.linger_s, trim_s=config.trim_s)
    server = Server(listener.socket, {os.geteuid(), 0})
    manager = Notifier(env.get("NOTIFY_SOCKET", ""))
    keeping = Keeping(manager) if manager.is_there else None
    runner = Runner(engine, server.outlet, workers=config.workers, keeper=keeping)
    if keeping is not None:
        _take_back(keeping.take_back(take_fds(env)), runner, server)
    codes: list[int] = []

    def run() -> None:
        try:
            codes.append(runner.run())
        except Exception:
            log.exception("the engine crashed")
            codes.append(EXIT_CRASHED)
        finally:
            server.stop()

    told: list[float] = []

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        told.append(time.monotonic())
        if told[-1] - told[0] >= _ECHO_S:
            os._exit(128 + signal.SIGTERM)  # asked twice: at once; a commit is one atomic put
        if len(told) > 1:  # Slurm says it twice within 70 ms (seen)
            return
        signal.setitimer(signal.ITIMER_REAL, config.drain_s + _OVERDUE_S)
        runner.post(ev.StopAsked(time.monotonic() + config.drain_s))
        manager.stopping()

    def on_alarm(_number: int, _frame: FrameType | None) -> None:
        unlisten(config.socket, listener)
        os._exit(EXIT_UNFINISHED)  # some thread hangs, be it in the store or with no work at all

    thread = threading.Thread(target=run, name="ckptd-engine", daemon=True)
    signal.signal(signal.SIGALRM, on_alarm)
    _take_signals(on_signal, server.wake_fd())
    with serve_metrics(config.metrics_address, engine):
        thread.start()
        log.info("serving on %s, pid %d", config.socket, os.getpid())
        manager.ready()
        server.serve(runner)
        thread.join(timeout=5.0)
    signal.setitimer(signal.ITIMER_REAL, 0)  # soon the socket may be another daemon's
    code = codes[0] if codes else EXIT_CRASHED
    log.info("exit %d", code)
    return code


def _take_back(taken: Iterable[TakenBack], runner: Runner, server: Server) -> None:
    """Give the engine what a former daemon left, before any client comes."""
    for back in taken:
        runner.give_arena(back.event.client, back.event.message.arena, back.arena)
        runner.post(back.event)
        server.follow(back.event.client, back.pidfd)


def _take_signals(handler: Callable[[int, FrameType | None], None], wake_fd: int) -> None:
    for number in _STOPPING:
        signal.signal(number, handler)
    # Python handles a signal between two bytecodes of the main thread, which sits in select(): a
    # byte in the pipe that it watches makes that return, whichever thread the signal came to.
    signal.set_wakeup_fd(wake_fd, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)


def set_up_log(level: str) -> None:
    """Write the log of this process to standard error, one line an event.

    Of other packages only warnings are written: at finer levels botocore logs requests with their
    session tokens, and s3fs its settings.
    """
    least = logging.getLevelName(level.upper())
    logging.basicConfig(
        level=max(least, logging.WARNING),
        format="%(asctime)s %(levelname).1s %(name)s: %(message)s",
    )
    logging.getLogger("ckptd").setLevel(least)


def main(config: DaemonConfig, env: MutableMapping[str, str], *, is_detached: bool = False) -> int:
    """Run a daemon as a process of its own; return its exit code, errors told in the log.

    Where work is left the process ends here, since a worker may hang in the store and the end of
    the interpreter would wait for it.
    """
    try:
        code = run_daemon(config, env, is_detached=is_detached)
    except CkptdError as error:
        log.error("%s", error)  # noqa: TRY400 - a known error needs no traceback
        return error.exit_code
    if code in (EXIT_UNFINISHED, EXIT_CRASHED):
        logging.shutdown()
        os._exit(code)
    return code
