"""At which call of `preempted()` all ranks stop: decided without a collective, a clock or I/O.

Each rank counts its calls. When it learns of a notice, it publishes how many there were, and from
then on no call is answered before the counts of all ranks are known: the rank is frozen at its
count. All stop at the largest count plus one, which no rank has reached yet.

Why none has. Two threads touch a count, in opposite orders. The thread that trains counts a call
and looks *then* whether all is quiet; the thread that listens ends the quiet and reads the count
*then*. So a call that found it quiet was counted before the quiet ended, and is in the count that
was read: it lies below the call at which all stop, and answering "go on" at once was right. Any
other call finds that it is not quiet and waits. There is one order of all these accesses: they are
taken under the interpreter's lock, and without it a write to an attribute takes the object's lock,
which is a full barrier. So the call that nothing has happened to takes no lock itself.
"""

from __future__ import annotations

from collections.abc import Iterable


class Stopping:
    """One rank's part. `ask` belongs to the thread that trains, the rest to the one that listens.

    Attributes:
        calls: how often this rank asked.
        is_quiet: whether a call may be answered at once; only while somebody listens.
        target: the call at which all stop; None until it is known.
    """

    __slots__ = ("calls", "is_quiet", "target")

    def __init__(self) -> None:
        self.calls = 0
        self.is_quiet = False
        self.target: int | None = None

    def ask(self) -> bool | None:
        """Count a call. True: stop here; False: go on; None: it has to be found out first."""
        self.calls += 1  # before the look; see above
        if self.is_quiet:
            return False
        return self.answer()

    def answer(self) -> bool | None:
        """Answer the call that was counted last. Once True it stays True: calls only grow."""
        return None if self.target is None else self.calls >= self.target

    def listen(self) -> None:
        """Let calls be answered at once, from before somebody listens until `freeze`."""
        self.is_quiet = True

    def end_quiet(self) -> None:
        """Let no call be answered at once any more. For any thread and for signal handlers."""
        self.is_quiet = False

    def freeze(self) -> int:
        """Take notice; return the calls so far, for all ranks to know."""
        self.end_quiet()  # before the count is read; see above
        return self.calls

    def decide(self, counts: Iterable[int]) -> None:
        """Take the counts of all ranks; the first decision stands."""
        if self.target is None:
            self.target = max(counts) + 1

    def stop_alone(self) -> None:
        """Stop at whatever call is next, since there are counts that will not come."""
        if self.target is None:
            self.target = 0
