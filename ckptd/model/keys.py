"""The names of objects below a root, made and read in this one place.

Everything that lists, reads or deletes goes through this grammar: a key that does not parse is not
ours and is never touched.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_STEP = 10**12 - 1
MAX_ATTEMPT = 9999
MAX_RANK = 99_999

ROOT_RECORD = "ckptd.json"
ATTEMPTS = "attempts/"
CHUNKS = "chunks/"
RANKS = "ranks/"
CHECKPOINTS = "checkpoints/"

_STEP_ID = re.compile(r"([0-9]{12})-([0-9]{4})", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{32}", re.ASCII)
_CHUNK = re.compile(r"chunks/([0-9a-f]{2})/([0-9a-f]{32})-([0-9]{12}-[0-9]{4})", re.ASCII)
_RANK = re.compile(r"ranks/([0-9]{12}-[0-9]{4})/([0-9]{5})", re.ASCII)
_CHECKPOINT = re.compile(r"checkpoints/([0-9]{12}-[0-9]{4})", re.ASCII)
_ATTEMPT = re.compile(r"attempts/([0-9]{4})", re.ASCII)
_ANY = re.compile(r"[a-z]+(/[0-9a-z-]+){0,2}|ckptd\.json", re.ASCII)


class StepId(NamedTuple):
    """A step of an attempt, committed or not: the name under which it stands in a store."""

    attempt: int
    step: int

    def __str__(self) -> str:
        return f"{self.step:012d}-{self.attempt:04d}"

    @property
    def short(self) -> str:
        """How people write it: ``1000-0007``."""
        return f"{self.step}-{self.attempt:04d}"

    @classmethod
    def parse(cls, text: str) -> StepId:
        """Read the form that stands in keys.

        Raises:
            ValueError: if `text` is anything else.
        """
        match = _STEP_ID.fullmatch(text)
        if match is None:
            raise ValueError(f"not a step id: {text[:80]!r}")
        return cls(attempt=int(match[2]), step=int(match[1]))


class ChunkId(NamedTuple):
    """A chunk's name: its content (32 hex digits of xxh3-128) and its birth."""

    hash: str
    birth: StepId

    @property
    def key(self) -> str:
        """The chunk's key in the store."""
        return f"{CHUNKS}{self.hash[:2]}/{self.hash}-{self.birth}"


def is_key(text: str) -> bool:
    """Tell whether `text` may be used as a key at all: no traversal, no odd characters."""
    return len(text) <= 200 and _ANY.fullmatch(text) is not None


def is_hash(text: str) -> bool:
    """Tell whether `text` is 32 lower-case hex digits."""
    return _HASH.fullmatch(text) is not None


def attempt(ordinal: int) -> str:
    """Return the key of an attempt record."""
    return f"{ATTEMPTS}{ordinal:04d}"


def rank(step: StepId, number: int) -> str:
    """Return the key of a rank manifest, or of the outcome record in its place."""
    return f"{RANKS}{step}/{number:05d}"


def checkpoint(step: StepId) -> str:
    """Return the commit key."""
    return f"{CHECKPOINTS}{step}"


def parse_attempt(key: str) -> int | None:
    """Return the ordinal in an attempt record's key, or None."""
    match = _ATTEMPT.fullmatch(key)
    return int(match[1]) if match else None


def parse_rank(key: str) -> tuple[StepId, int] | None:
    """Return step and rank of a rank manifest's key, or None."""
    match = _RANK.fullmatch(key)
    return (StepId.parse(match[1]), int(match[2])) if match else None


def parse_checkpoint(key: str) -> StepId | None:
    """Return the step of a commit key, or None."""
    match = _CHECKPOINT.fullmatch(key)
    return StepId.parse(match[1]) if match else None


def parse_chunk(key: str) -> ChunkId | None:
    """Return content and birth of a chunk's key, or None."""
    match = _CHUNK.fullmatch(key)
    if match is None or not match[2].startswith(match[1]):
        return None
    return ChunkId(match[2], StepId.parse(match[3]))
