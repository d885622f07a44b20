"""Warnings that the machine will be taken away: heard on one rank, and told to all.

What is decided, and why without a lock, stands in `ckptd.trainer.stopping`.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from ckptd.errors import ConfigError, MeetingError
from ckptd.trainer.meeting import Meeting
from ckptd.trainer.signals import take_over
from ckptd.trainer.stopping import Stopping

log = logging.getLogger("ckptd.trainer")

GRACE_S = 25.0  # torchrun and Kubernetes kill 30 s after their warning
DECIDE_TIMEOUT_S = 10.0
_POLL_S = 0.5
_LOST_POLL_S = 30.0
_OVERTIME_S = 1.0
_FIRST_DELAY_S, _LAST_DELAY_S = 0.02, 0.5
_REQUEST_RATE = 1000  # per second: what all ranks together may ask of the server of the board

_NOTICE, _CALLS = "preempted", "preempted/calls"


class Notice(NamedTuple):
    """Why the job is to stop, and when that was known here, by the monotonic clock."""

    reason: str
    at: float


class Sources(NamedTuple):
    """Where a notice may come from, and how long there is after it."""

    stop_signals: tuple[str, ...] = ()
    stop_file: str | None = None
    grace_s: float = GRACE_S

    @classmethod
    def of(cls, stop_signals: Sequence[str], env: Mapping[str, str]) -> Sources:
        """Read what the environment says; see docs/operations.md.

        Raises:
            ConfigError: naming the variable that cannot be read.
        """
        text = env.get("CKPTD_GRACE_S", "")
        try:
            grace_s = float(text) if text else GRACE_S
        except ValueError:
            grace_s = 0.0
        if not 0 < grace_s < 1e7:
            raise ConfigError(f"CKPTD_GRACE_S={text!r}: write seconds, more than 0")
        return cls(tuple(stop_signals), env.get("CKPTD_STOP_FILE") or None, grace_s)


class Preemption:
    """Hears of notices, and finds the call of `ask` at which all ranks stop.

    `begin` and `ask` belong to the thread that trains, `notify` to any thread and to signal
    handlers. Nothing listens before `begin`, which the first `ask` calls. A board that fails never
    raises here: then a rank that was given notice itself stops, if need be alone.
    """

    def __init__(self, meeting: Meeting, sources: Sources) -> None:
        self._meeting = meeting
        self._sources = sources
        self._stopping = Stopping()
        self._heard: Notice | None = None  # the first notice; written once
        # Wakes the thread. Unlike a lock or an event it may be used in a signal handler, whatever
        # that has interrupted (`put` is reentrant), and unlike a pipe it cannot be closed too early.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the target of _stopping, and _is_over
        self._is_over = False
        self._give_back: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None

    # --- for the thread that trains --------------------------------------------------------------

    def ask(self) -> bool:
        """Tell whether to stop here; on all ranks alike, at the same call. Once True, always True.

        Costs an addition and a look while there was no notice. The calls after one may wait until
        all ranks have said how often they asked, for `DECIDE_TIMEOUT_S` or half of the grace.
        """
        answer = self._stopping.ask()
        return self._wait_decided() if answer is None else answer

    def begin(self) -> None:
        """Take the signals over, and listen. Does nothing the second time, or after `close`."""
        if self._thread is not None or self._is_over:
            return
        if self._heard is None:
            self._stopping.listen()
        self._give_back = take_over(self._sources.stop_signals, self.notify)
        self._thread = threading.Thread(target=self._run, name="ckptd-preempt", daemon=True)
        self._thread.start()

    def grace_left_s(self) -> float:
        """Return how long there is until this process is killed, 0 if that may be at any moment."""
        heard = self._heard
        passed_s = 0.0 if heard is None else time.monotonic() - heard.at
        return max(0.0, self._sources.grace_s - passed_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Give the signals back and end the thread; one that waits for a dead board is left.

        May be repeated.
        """
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._give_back()
        self._wakes.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    # --- for anybody -----------------------------------------------------------------------------

    @property
    def reason(self) -> str | None:
        """Why the job is to stop; None as long as this rank knows of nothing."""
        heard = self._heard
        return None if heard is None else heard.reason

    @property
    def noticed_at(self) -> float | None:
        """When this rank was given notice, by the monotonic clock."""
        heard = self._heard
        return None if heard is None else heard.at

    @property
    def is_stopping(self) -> bool:
        """Whether the call of `ask` at which all stop was made."""
        return self._stopping.answer() is True

    def notify(self, reason: str) -> None:
        """Give notice to all ranks; before `begin` it is remembered, and counts from then on.

        For any thread and for signal handlers: takes no lock, logs nothing, does no I/O.
        """
        if self._heard is None:
            self._heard = Notice(reason, time.monotonic())
            # Here already, so that calls come to an end even if the thread hangs in the board.
            self._stopping.end_quiet()
            self._wakes.put(None)

    # --- the decision ----------------------------------------------------------------------------

    @property
    def _patience_s(self) -> float:
        """How long a decision may take: the other half of the grace is for the save."""
        return min(DECIDE_TIMEOUT_S, self._sources.grace_s / 2)

    def _wait_decided(self) -> bool:
        self.begin()
        if self._stopping.is_quiet:
            return False  # this call is the first, and the thread began after it was counted
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopping.target is not None or self._is_over,
                self._patience_s + _OVERTIME_S,  # the thread has the first word, and knows more
            )
            if self._stopping.target is None and self._is_over:
                return self._heard is not None
        self._stop_alone("the job's store or the stop file's disk does not answer")
        return self._stopping.answer() is True

    def _stop_alone(self, why: str) -> None:
        """Stop without the others, unless all is decided."""
        with self._changed:
            if self._stopping.target is not None:
                return
            self._stopping.stop_alone()
            self._changed.notify_all()
        log.error(
            "preemption (%s): %s. This rank stops by itself, so the step that it saves now may "
            "lack the part of another rank", self.reason, why,
        )  # fmt: skip

    def _decide(self, counts: Sequence[int]) -> None:
        with self._changed:
            self._stopping.decide(counts)
            self._changed.notify_all()
        log.info(
            "preemption: all ranks stop at call %s of preempted(); here there were %d",
            self._stopping.target, self._stopping.calls,
        )  # fmt: skip

    # --- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            notice = self._listen()
            if notice is not None:
                self._agree(notice)
        except Exception:
            log.exception("the thread that listens for preemption failed; no rank is told any more")
            with self._changed:  # calls look for a notice to this process themselves from now on
                self._is_over = True
                self._changed.notify_all()
            self._stopping.freeze()

    def _listen(self) -> Notice | None:
        """Wait for a notice; None if it is over before one comes."""
        poll_s, is_lost = self._no_faster_than(_POLL_S), False
        is_alone = self._meeting.world_size == 1 and self._sources.stop_file is None
        while not self._is_over:
            try:
                found = self._heard or self._look()
                if is_lost:
                    log.info("the job's store answers again")
                is_lost = False
            except MeetingError as error:
                if not is_lost:
                    log.error(  # noqa: TRY400 - the message has all
                        "until it answers, this rank hears of no preemption but its own: %s", error
                    )
                found, is_lost = None, True
            if found is not None:
                self._heard = self._heard or found
                return self._heard
            self._pause(None if is_alone else _LOST_POLL_S if is_lost else poll_s)
        return None

    def _look(self) -> Notice | None:
        """Look where a notice cannot wake this thread: at the stop file and on the board."""
        path = self._sources.stop_file
        if path is not None and os.path.exists(path):
            return Notice(f"{path} is there", time.monotonic())
        if self._meeting.world_size == 1:
            return None
        (value,) = self._meeting.fetch([_NOTICE])
        if value is None:
            return None
        rank, reason, age_s = msgspec.msgpack.decode(value, type=tuple[int, str, float])
        return Notice(f"rank {rank}: {reason}", time.monotonic() - age_s)

    def _agree(self, notice: Notice) -> None:
        """Say how often this rank asked, and find out about the others."""
        calls = self._stopping.freeze()
        log.warning("preemption: %s", notice.reason)
        if self._meeting.world_size == 1:
            self._decide([calls])
            return
        deadline = time.monotonic() + self._patience_s
        delay_s, is_told = self._no_faster_than(_FIRST_DELAY_S), False
        while not self._is_over:
            is_late = time.monotonic() >= deadline
            try:
                if not is_told:
                    self._tell(notice, calls)
                    is_told = True
                counts = self._meeting.read_all(_CALLS)
                if counts is not None:
                    self._decide([msgspec.msgpack.decode(each, type=int) for each in counts])
                    return
                why = self._missing() if is_late else ""
            except MeetingError as error:
                why = str(error)
            if is_late:
                self._stop_alone(why)
                return
            self._pause(min(delay_s, max(0.0, deadline - time.monotonic())))
            delay_s = min(2 * delay_s, self._no_faster_than(_LAST_DELAY_S))

    def _tell(self, notice: Notice, calls: int) -> None:
        said = (self._meeting.rank, notice.reason[:1000], time.monotonic() - notice.at)
        self._meeting.share(_NOTICE, msgspec.msgpack.encode(said))
        self._meeting.publish(_CALLS, msgspec.msgpack.encode(calls))

    def _missing(self) -> str:
        ranks = range(self._meeting.world_size)
        found = self._meeting.fetch([f"{_CALLS}/{rank}" for rank in ranks])
        absent = [str(rank) for rank, value in zip(ranks, found, strict=True) if value is None]
        more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
        return (
            f"rank {', '.join(absent[:8])}{more} did not say within {self._patience_s:g} s how often "
            "it asked preempted(): dead, or it never asked"
        )

    def _pause(self, timeout_s: float | None) -> None:
        """Wait until somebody wakes this thread."""
        try:
            self._wakes.get(timeout=timeout_s)
        except queue.Empty:
            return

    def _no_faster_than(self, delay_s: float) -> float:
        """Return a pause after which all ranks together do not ask too much of one server."""
        return max(delay_s, self._meeting.world_size / _REQUEST_RATE)
