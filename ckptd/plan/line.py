"""Which checkpoints there are, and which of them lie on the line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from ckptd.errors import ConfigError
from ckptd.model import keys
from ckptd.model.keys import StepId

_STEP_TEXT = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,4}))?", re.ASCII)


class HasKey(Protocol):
    """An object in a listing of a store, as much of it as counts here."""

    @property
    def key(self) -> str:
        """Its key."""

    @property
    def bytes(self) -> int:
        """Its length."""

    @property
    def modified_s(self) -> float:
        """The store's own time, in seconds since 1970."""


class Commit(NamedTuple):
    """An object under a commit key. `committed_at` is the store's time, for people and ages."""

    id: StepId
    bytes: int
    committed_at: float


def parse_commits(entries: Iterable[HasKey]) -> list[Commit]:
    """Return the committed steps of a listing of ``checkpoints/``, by attempt and then step."""
    # Zero bytes are a tombstone: a step that will never be committed, or is no more.
    parsed = ((keys.parse_checkpoint(entry.key), entry) for entry in entries if entry.bytes)
    found = [Commit(id_, entry.bytes, entry.modified_s) for id_, entry in parsed if id_]
    return sorted(found, key=lambda commit: commit.id)


def newest(commits: Iterable[Commit]) -> Commit | None:
    """Return the highest step of the highest attempt that has a commit; None if there is none.

    Never by time, and never by step alone: a job that was restarted from an older step goes on from
    its own steps, not from the higher ones that it left behind.
    """
    return max(commits, key=lambda commit: commit.id, default=None)


def line(
    commits: Sequence[Commit], previous_of: Callable[[StepId], StepId | None]
) -> Iterator[Commit]:
    """Give the commits of the line, newest first.

    Within an attempt every lower step is on the line, since steps only rise there; so `previous_of`
    (which reads a manifest) is asked for the lowest step of an attempt only, and only when the
    caller has come that far. The line ends where `previous` was pruned within that same attempt:
    what lies before is not known then.
    """
    at = newest(commits)
    while at is not None:
        attempt, step = at.id
        below = [c for c in commits if c.id.attempt == attempt and c.id.step <= step]
        below.sort(key=lambda c: c.id, reverse=True)
        yield from below
        previous = previous_of(below[-1].id)
        if previous is None or previous.attempt >= attempt:
            return
        # The step itself may have been pruned: the next lower one of its attempt is on the line.
        at = newest(c for c in commits if c.id.attempt == previous.attempt and c.id <= previous)


def parse_step_text(text: str) -> tuple[int, int | None]:
    """Read how people name a step, ``1000`` or ``1000-0007``, as step and attempt.

    Raises:
        ConfigError: `text` is anything else.
    """
    match = _STEP_TEXT.fullmatch(text)
    if match is None or (match[2] is not None and int(match[2]) == 0):
        raise ConfigError(f"not a step: {text[:80]!r}; write 1000, or 1000-0007 with its attempt")
    return int(match[1]), int(match[2]) if match[2] else None
