"""Signals that announce the end: taken over, passed on to who was there before, and given back.

A handler of ours does nothing but call those who listen, who take no lock, log nothing and touch no
store. All of a process share one handler for each signal, so they may leave in any order.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

log = logging.getLogger("ckptd.trainer")

Hear = Callable[[str], None]

_lock = threading.RLock()  # guards _standing and who listens; no handler takes it
_standing: dict[int, _Takeover] = {}  # what was put in place last, by signal


class _Takeover:
    """A handler, and what it stands in front of.

    Somebody else may take the signal over later and call this one: then it cannot be taken away and
    stays, without listeners.
    """

    def __init__(self, number: int, previous: Any) -> None:
        self.number = number
        self.previous = previous
        self.listeners: tuple[Hear, ...] = ()  # replaced as a whole: a handler may run at any time

    def __call__(self, number: int, frame: FrameType | None) -> None:
        listeners = self.listeners
        for hear in listeners:
            hear(signal.Signals(number).name)
        if self._is_chained():
            self.previous(number, frame)
        elif not listeners and self.is_in_place():
            # All left on threads that cannot give a signal back: it does what it did before.
            signal.signal(number, self.previous)
            signal.raise_signal(number)

    def is_in_place(self) -> bool:
        return signal.getsignal(self.number) is self

    def leave(self, hear: Hear) -> None:
        """Tell one of those who listen nothing more; the last one's going gives the signal back."""
        self.listeners = tuple(each for each in self.listeners if each is not hear)
        if not self.listeners and self.is_in_place():
            try:
                signal.signal(self.number, self.previous)
            except ValueError:  # not in the main thread: given back when the signal comes
                return
            _standing.pop(self.number, None)

    def _is_chained(self) -> bool:
        # What Python does about SIGINT by itself is a function, but a default all the same.
        return callable(self.previous) and self.previous is not signal.default_int_handler


def take_over(names: Sequence[str], hear: Hear) -> Callable[[], None]:
    """Let `hear` be called with the name of each signal that comes; return how to end that.

    Handlers that are functions are called afterwards; default actions are not taken. Python lets
    only the main thread do this; elsewhere it is logged, and left. What is returned may be called
    from any thread, and again. A forked child has what was there before.
    """
    if names and threading.current_thread() is not threading.main_thread():
        log.info(
            "%s: only the main thread can hear signals, and this is another one; "
            "call notify_preemption() when a warning comes", " and ".join(names),
        )  # fmt: skip
        return lambda: None
    with _lock:
        taken = [_stand_before(signal.Signals[name]) for name in names]
        for takeover in taken:
            takeover.listeners = (*takeover.listeners, hear)

    def give_back() -> None:
        with _lock:
            for takeover in taken:
                takeover.leave(hear)

    return give_back


def _stand_before(number: int) -> _Takeover:
    """Return the handler of ours that is in place, put there if none is."""
    found = _standing.get(number)
    if found is None or not found.is_in_place():
        # None stands for a handler that is not Python's; it cannot be called or put back.
        found = _Takeover(number, signal.getsignal(number) or signal.SIG_DFL)
        signal.signal(number, found)
        _standing[number] = found
    return found


def _forget() -> None:
    """In a forked child: nobody listens, and signals do what they did before."""
    for number, takeover in _standing.items():
        takeover.listeners = ()
        if takeover.is_in_place():
            signal.signal(number, takeover.previous)
    _standing.clear()


os.register_at_fork(after_in_child=_forget)
