"""The thread that talks to the daemon, so that the training thread never does."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from ckptd import errors, failpoints
from ckptd.errors import (
    CkptdError,
    ConfigError,
    DaemonUnavailableError,
    HandoffError,
    ProtocolError,
    SaveUnknownError,
)
from ckptd.model.keys import StepId
from ckptd.trainer.handle import error_of
from ckptd.trainer.pending import Pending
from ckptd.trainer.ports import Port
from ckptd.trainer.questions import Answer, Questions
from ckptd.wire import messages as say

log = logging.getLogger("ckptd.trainer")

WELCOME_TIMEOUT_S = 30.0
YIELD_S = 0.002
_RETRY_S = (0.05, 0.2, 1.0, 2.0)
_OVERTIME_S = 120.0


class Link:
    """Hands snapshots to a daemon and brings the final words back.

    `submit`, `begin`, `ask`, `settle` and `close` may be called from any thread and, except for their own
    timeouts, do not block. A daemon that dies is found or started again, and what has no final word yet is
    handed off once more from its slot.

    Args:
        open_port: opens a conversation; given the descriptor to write to when something came.
        hello: the first message of each conversation.
        give_up_s: how long a snapshot may wait for a daemon before its save fails.
        on_stop: called on the link's thread with the reason when somebody wants the job to end.
    """

    def __init__(
        self,
        open_port: Callable[[int], Port],
        hello: say.Hello,
        *,
        give_up_s: float,
        on_stop: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._open_port = open_port
        self._hello = hello
        self._give_up_s = give_up_s
        self._on_stop = on_stop
        self._questions = Questions(self._wake)
        self._changed = threading.Condition()  # guards what follows, down to _refused
        self._pending: dict[int, Pending] = {}
        self._outgoing: deque[Pending] = deque()
        self._newest: StepId | None = None
        self._wants_daemon = False
        self._keeps = False
        self._is_over = False
        self._refused: CkptdError | None = None
        # Of the thread alone:
        self._port: Port | None = None
        self._told_arena: int | None = None
        self._told_recipes: list[int] = []
        self._is_greeting = False
        self._failures = 0
        self._next_try = 0.0
        self._parted_at = 0.0
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._thread = threading.Thread(target=self._run, name="ckptd-link", daemon=True)
        self._thread.start()

    # --- for the trainer -----------------------------------------------------------------------

    @property
    def newest(self) -> StepId | None:
        """The newest checkpoint of this attempt that is known to be committed."""
        with self._changed:
            return self._newest

    def submit(self, pending: Pending) -> None:
        """Hand a snapshot off, or a refusal, in the order of the calls."""
        pending.since = time.monotonic()
        with self._changed:
            refused = self._refused
            if refused is None:
                self._pending[pending.handle.step] = pending
                self._outgoing.append(pending)
        if refused is not None:
            pending.let_go()
            pending.handle.resolve(refused)
        self._wake()

    def begin(self) -> None:
        """Find or start a daemon now, and not when the first snapshot needs it."""
        with self._changed:
            self._wants_daemon = True
        self._wake()

    def ask(self, message: say.FromTrainer, timeout_s: float) -> Answer | None:
        """Ask the daemon something and wait; None if there is no answer in time."""
        with self._changed:
            if self._refused is not None or self._is_over:
                return None
        return self._questions.ask(message, timeout_s)

    def settle(self, timeout_s: float) -> bool:
        """Wait until the daemon has written what earlier attempts handed off; False if not in time."""
        return self.ask(say.Settle(), timeout_s) is not None

    def wait(self, timeout_s: float | None) -> bool:
        """Wait until every save has its final word; False if not in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, timeout_s)

    def close(self, *, keeps: bool = False) -> None:
        """Say goodbye and end the thread. What was handed off is finished by the daemon.

        With `keeps` the daemon keeps the newest snapshots in memory: the job will start again.
        """
        with self._changed:
            if self._is_over:
                return
            self._is_over, self._keeps = True, keeps
        self._questions.end()
        self._wake()
        self._thread.join()
        os.close(self._wake_in)
        os.close(self._wake_out)

    # --- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_finished():
            try:
                self._converse()
            except HandoffError as error:
                self._hang_up(error)
            except CkptdError as error:
                self._refuse(error)
            except Exception as error:
                log.exception("the thread that talks to the daemon failed")
                self._refuse(HandoffError(f"internal error: {error!r}"))
            self._expire()
        self._farewell()

    def _is_finished(self) -> bool:
        """Over, and nothing that still has to reach a daemon, also of what a dead one had."""
        with self._changed:
            if not self._is_over or self._refused is not None:
                return self._is_over
            is_orphaned = self._port is None and any(
                not pending.is_written for pending in self._pending.values()
            )
            return not self._outgoing and not is_orphaned

    def _converse(self) -> None:
        """Do one round: have a conversation, send what waits, take what came."""
        now = time.monotonic()
        if self._port is None and now >= self._next_try and self._has_business():
            self._connect()
        if self._port is not None:
            self._send_waiting(self._port)
        self._wait_for_news()
        if self._port is not None:
            for message in self._port.receive():
                self._heard(message)

    def _has_business(self) -> bool:
        with self._changed:
            is_wanted = bool(self._pending) or self._wants_daemon or self._questions.is_open
            return self._refused is None and is_wanted

    def _connect(self) -> None:
        port = self._open_port(self._wake_out)
        self._is_greeting = True
        try:
            port.send(self._hello)
            self._await_welcome(port)
        except BaseException:
            port.close()
            raise
        self._port, self._failures, self._is_greeting = port, 0, False
        self._told_arena, self._told_recipes = None, []
        with self._changed:
            self._outgoing = deque(self._pending.values())

    def _await_welcome(self, port: Port) -> None:
        deadline = time.monotonic() + WELCOME_TIMEOUT_S
        while (left := deadline - time.monotonic()) > 0:
            self._select(port, left)
            messages = port.receive()
            for message in messages:  # a word to stop may come right behind the welcome
                if not isinstance(message, say.Welcome):
                    self._heard(message)
            if any(isinstance(message, say.Welcome) for message in messages):
                return
        raise DaemonUnavailableError("the daemon did not answer the hello; is it stopped?")

    def _send_waiting(self, port: Port) -> None:
        with self._changed:
            self._wants_daemon = False
        while (pending := self._next_outgoing()) is not None:
            self._send_one(port, pending)
        while (question := self._questions.next()) is not None:
            port.send(question)

    def _next_outgoing(self) -> Pending | None:
        with self._changed:
            return self._outgoing.popleft() if self._outgoing else None

    def _send_one(self, port: Port, pending: Pending) -> None:
        message = pending.message_after(self.newest)
        if pending.is_written and isinstance(message, say.Handoff):
            port.send(say.Watch(message.step, message.sequence, message.previous))
            return
        if isinstance(message, say.Handoff):
            assert pending.arena is not None
            assert pending.recipe is not None
            number, arena = pending.arena
            if self._told_arena != number:
                port.send(say.Arena(number, arena.slots, arena.slot_bytes), arena)
                self._told_arena = number
            if pending.recipe.recipe not in self._told_recipes:
                port.send(pending.recipe)
                told = [*self._told_recipes, pending.recipe.recipe]
                self._told_recipes = told[-say.MAX_RECIPES :]
        failpoints.hit("link.send")
        pending.is_sent = True
        port.send(message)
        failpoints.hit("link.sent")

    def _wait_for_news(self) -> None:
        timeout = 1.0
        if self._port is None and self._has_business():
            timeout = max(0.0, min(timeout, self._next_try - time.monotonic()))
        self._select(self._port, timeout)

    def _select(self, port: Port | None, timeout_s: float) -> None:
        poll = select.poll()
        poll.register(self._wake_in, select.POLLIN)
        if port is not None and (fd := port.fileno()) is not None:
            poll.register(fd, select.POLLIN)
        poll.poll(int(timeout_s * 1000) + 1)
        # Whoever woke this thread is about to return to training, and needs the interpreter.
        time.sleep(YIELD_S)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_in, 4096)

    def _heard(self, message: say.FromDaemon) -> None:
        if isinstance(message, say.Written):
            with self._changed:
                pending = self._pending.get(message.step)
            failpoints.hit("link.written")
            if pending is not None:
                pending.is_written = True
                pending.let_go()
        elif isinstance(message, say.Finished):
            self._finished(message)
        elif isinstance(message, say.Taken):
            self._taken(message)
        elif isinstance(message, say.Stop):
            self._on_stop(message.reason)
        elif isinstance(message, say.Refused):
            raise _refusal(message)
        elif self._port is not None:
            self._questions.answered(message, self._port.take_fd)

    def _taken(self, message: say.Taken) -> None:
        with self._changed:
            pending = self._pending.get(message.step)
        if pending is not None:
            pending.handle.taken()

    def _finished(self, message: say.Finished) -> None:
        with self._changed:
            pending = self._pending.get(message.step)
            if message.state == "committed":
                found = StepId(attempt=self._hello.attempt, step=message.step)
                self._newest = max(found, self._newest or found)
        if pending is not None:
            self._resolve(pending, error_of(message))

    # --- endings -------------------------------------------------------------------------------

    def _resolve(self, pending: Pending, error: CkptdError | None) -> None:
        if error is not None and not pending.handle.is_done:  # a skip was told already
            log.error("not committed: %s", error)
        pending.let_go()
        pending.handle.resolve(error)
        with self._changed:
            self._pending.pop(pending.handle.step, None)
            if pending in self._outgoing:
                self._outgoing.remove(pending)
            self._changed.notify_all()

    def _hang_up(self, error: HandoffError) -> None:
        """Drop the conversation; another is opened after a while."""
        # The daemon that somebody else's goodbye has just ended looks like this, once.
        is_harmless = self._is_greeting and self._failures == 0
        self._is_greeting = False
        if self._port is not None:
            self._port.close()
            self._port = None
            # What was handed off long ago gets the whole time to find another daemon.
            self._parted_at = time.monotonic()
        with self._changed:
            for pending in self._pending.values():
                pending.part()
            if self._failures >= len(_RETRY_S):
                self._wants_daemon = False  # the first snapshot will look for one again
        self._questions.lost()
        # Half of what a snapshot waits at most: each one is offered at least once.
        wait_s = min(_RETRY_S[min(self._failures, len(_RETRY_S) - 1)], self._give_up_s / 2)
        self._failures += 1
        self._next_try = time.monotonic() + wait_s
        is_news = self._failures <= len(_RETRY_S) and not is_harmless
        level = logging.WARNING if is_news else logging.DEBUG
        log.log(level, "daemon: %s; trying again", error)
        if isinstance(error, ProtocolError):
            self._refuse(error)

    def _refuse(self, error: CkptdError) -> None:
        """Fail everything: no daemon will take this trainer's snapshots."""
        if self._port is not None:
            self._port.close()
            self._port = None
        with self._changed:
            self._refused = error
            pending = list(self._pending.values())
            self._changed.notify_all()
        self._questions.end()
        for each in pending:
            self._resolve(each, error)

    def _expire(self) -> None:
        """Fail saves that found no daemon in time, or whose final word never came."""
        now = time.monotonic()
        limit_s = self._hello.commit_timeout_s + _OVERTIME_S
        with self._changed:
            pending = list(self._pending.values())
        for each in pending:
            alone_s = now - max(each.since, self._parted_at)
            if self._port is None and not each.is_written and alone_s > self._give_up_s:
                self._resolve(each, each.abandoned(self._give_up_s))
            elif now - each.since > limit_s:
                reason = f"step {each.handle.step}: no final word in {limit_s:.0f} s"
                self._resolve(each, SaveUnknownError(reason, step=each.handle.step))

    def _farewell(self) -> None:
        port, self._port = self._port, None
        if port is not None:
            with contextlib.suppress(HandoffError):
                port.send(say.Goodbye(self._keeps))
            port.close()
            for message in _rest_of(port):
                with contextlib.suppress(CkptdError):
                    self._heard(message)
        with self._changed:
            pending = list(self._pending.values())
            self._pending.clear()
            self._changed.notify_all()
        for each in pending:  # nobody listens any more: a handle must not wait for ever
            step = each.handle.step
            reason = f"step {step}: closed before its final word; the daemon goes on with it"
            each.let_go()
            each.handle.resolve(SaveUnknownError(reason, step=step))

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_out, b"w")


def _rest_of(port: Port) -> list[say.FromDaemon]:
    """Return what an engine in this process said while it was closing."""
    return port.receive() if port.fileno() is None else []


def _refusal(message: say.Refused) -> CkptdError:
    kind = errors.class_named(message.kind)
    if kind.retryable:
        return DaemonUnavailableError(message.reason)  # it stops, or its store does not answer now
    if message.kind == ProtocolError.__name__:
        return ProtocolError(message.reason)
    return ConfigError(f"the daemon refused this job: {message.reason}")
