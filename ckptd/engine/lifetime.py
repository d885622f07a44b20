"""When a daemon ends: after a drain, or when nobody needs it any more."""

from __future__ import annotations

from collections.abc import Iterator

from ckptd.engine.events import Effect, Exit, Idle

EXIT_DRAINED = 0
EXIT_UNFINISHED = 6

TRIM_S = 60.0
FIRST_CLIENT_S = 5.0


class Lifetime:
    """Counts the reasons to stay.

    Args:
        linger_s: how long to stay without clients after one vanished, or if none ever came, so that
            restarted workers find the daemon; None to stay for ever. Where every client said
            goodbye the end comes at once.
        trim_s: how long to keep memory for the next snapshot when there is nothing to do. Getting
            it anew costs cores that train.
    """

    def __init__(self, linger_s: float | None, trim_s: float = TRIM_S) -> None:
        self._linger_s = linger_s
        self._trim_s = trim_s
        self._must_linger = True
        # Whoever started it comes within this at least, however short it is to linger.
        self._patience_s = None if linger_s is None else max(linger_s, FIRST_CLIENT_S)
        self._lonely_since: float | None = None
        self._idle_since: float | None = None
        self._is_trimmed = True
        self._stop_at: float | None = None

    @property
    def is_draining(self) -> bool:
        """Tell whether the end is near: jobs that are here go on, and no new one is taken."""
        return self._stop_at is not None

    def stop(self, deadline: float) -> None:
        """Drain, and end at `deadline` whatever is left; the earliest deadline counts.

        Clients that are connected are waited for: those who tell this daemon to go tell trainers
        too, whose last snapshot comes after that.
        """
        self._stop_at = deadline if self._stop_at is None else min(deadline, self._stop_at)

    def came(self) -> None:
        """Note a new client: what vanished before it has been replaced."""
        self._must_linger = False
        self._patience_s = self._linger_s

    def vanished(self) -> None:
        """Note that a client left without a goodbye."""
        self._must_linger = True

    def next_due(self) -> float | None:
        """Return when `check` may have something to say without any event."""
        times = [] if self._stop_at is None else [self._stop_at]
        if self._lonely_since is not None and self._patience_s is not None:
            times.append(self._lonely_since + self._patience_s)
        if self._idle_since is not None and not self._is_trimmed:
            times.append(self._idle_since + self._trim_s)
        return min(times, default=None)

    def check(self, now: float, *, is_idle: bool, has_clients: bool) -> Iterator[Effect]:
        """Yield `Idle` when there has been no work for a while, and `Exit` when it is time."""
        if not is_idle:
            self._idle_since, self._is_trimmed = None, False
        elif not self._is_trimmed:
            self._idle_since = now if self._idle_since is None else self._idle_since
            if now >= self._idle_since + self._trim_s:
                self._is_trimmed = True
                yield Idle()
        is_free = is_idle and not has_clients
        if self._stop_at is not None and (is_free or now >= self._stop_at):
            yield Exit(EXIT_DRAINED if is_idle else EXIT_UNFINISHED)
        elif not is_idle or has_clients:
            self._lonely_since = None
        elif self._patience_s is not None:
            self._lonely_since = now if self._lonely_since is None else self._lonely_since
            if not self._must_linger or now >= self._lonely_since + self._patience_s:
                yield Exit(EXIT_DRAINED)
