"""What a trainer asks a daemon, and waits for: one answer each, or none in time."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ckptd.wire import messages as say

_ANSWERS: dict[type[say.Message], type[say.Message]] = {
    say.Settle: say.Settled,
    say.Seek: say.Held,
    say.Borrow: say.Lent,
    say.Claim: say.Ceded,
}


class Answer(NamedTuple):
    """What the daemon said, and the descriptor that came with it: the caller's to close."""

    message: say.FromDaemon
    fd: int | None = None


class _Question:
    def __init__(self, message: say.FromTrainer) -> None:
        self.message = message
        self.answer: Answer | None = None
        self.is_over = False
        self.is_sent = False


class Questions:
    """Questions of one trainer, answered in the order in which those of a kind were asked.

    `ask` may be called from any thread; the rest belongs to the thread that talks to the daemon. What
    a lost conversation leaves unanswered is asked again in the next.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._changed = threading.Condition()  # guards the two below, and what is in them
        self._open: deque[_Question] = deque()
        self._is_over = False

    def ask(self, message: say.FromTrainer, timeout_s: float) -> Answer | None:
        """Ask, and wait; None if there is no answer in time or never will be one."""
        question = _Question(message)
        deadline = time.monotonic() + timeout_s
        with self._changed:
            if self._is_over:
                return None
            self._open.append(question)
        self._wake()
        with self._changed:
            self._changed.wait_for(lambda: question.is_over, max(0.0, deadline - time.monotonic()))
            question.is_over = True
            if not question.is_sent and question in self._open:
                self._open.remove(question)  # a sent one stays: its answer still comes
            return question.answer

    @property
    def is_open(self) -> bool:
        """Tell whether somebody waits for an answer."""
        with self._changed:
            return any(not question.is_over for question in self._open)

    def next(self) -> say.FromTrainer | None:
        """Return a question that has to be sent now; None if there is none."""
        with self._changed:
            for question in self._open:
                if not question.is_sent and not question.is_over:
                    question.is_sent = True
                    return question.message
        return None

    def answered(self, message: say.FromDaemon, take_fd: Callable[[], int]) -> None:
        """Give an answer to whoever asked; a descriptor that nobody waits for is closed."""
        has_fd = isinstance(message, (say.Lent, say.Ceded)) and message.slots > 0
        fd = take_fd() if has_fd else None
        with self._changed:
            question = next((q for q in self._open if self._fits(q, message)), None)
            if question is not None:
                self._open.remove(question)
                if not question.is_over:
                    question.answer, question.is_over, fd = Answer(message, fd), True, None
                    self._changed.notify_all()
        if fd is not None:
            os.close(fd)

    def lost(self) -> None:
        """Ask again, of the next daemon, what has no answer yet."""
        with self._changed:
            self._open = deque(q for q in self._open if not q.is_over)
            for question in self._open:
                question.is_sent = False

    def end(self) -> None:
        """Let everybody go: no answer will come any more. May be repeated."""
        with self._changed:
            self._is_over = True
            for question in self._open:
                question.is_over = True
            self._open.clear()
            self._changed.notify_all()

    @staticmethod
    def _fits(question: _Question, message: say.FromDaemon) -> bool:
        return question.is_sent and isinstance(message, _ANSWERS[type(question.message)])
