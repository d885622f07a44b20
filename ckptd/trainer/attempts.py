"""Starting an attempt: one ordinal for all ranks, in a root that all of them see."""

from __future__ import annotations

import getpass
import os
import secrets
import socket
from typing import NamedTuple

import msgspec

from ckptd import errors
from ckptd.codec.records import decode_record, encode_record
from ckptd.errors import (
    CkptdError,
    ConfigError,
    MeetingError,
    ObjectExistsError,
    ObjectNotFoundError,
)
from ckptd.model import keys
from ckptd.model.manifest import AttemptRecord
from ckptd.model.ready import make_ready
from ckptd.store.base import Store
from ckptd.store.root import create_root
from ckptd.trainer.meeting import Meeting


class Attempt(NamedTuple):
    """The ordinal of this incarnation of the job, and the random token of its record."""

    ordinal: int
    token: str


class _Call(msgspec.Struct):
    """What rank 0 tells the others: the attempt, or why there is none."""

    ordinal: int = 0
    token: str = ""
    kind: str = ""
    reason: str = ""


make_ready(_Call)


def start_attempt(store: Store, meeting: Meeting, timeout_s: float) -> Attempt:
    """Claim the next ordinal on rank 0 and hear of it on the others; every rank reads the record.

    Raises:
        ConfigError: the root cannot be used, or this rank does not see the root that rank 0 sees.
        StoreError: the root cannot be written or read.
        MeetingError: rank 0 did not say anything in time.
    """
    if meeting.rank == 0:
        return _claim_and_tell(store, meeting)
    call = msgspec.json.decode(meeting.hear("attempt", timeout_s), type=_Call)
    if call.kind:
        raise _same_error(call)
    attempt = Attempt(call.ordinal, call.token)
    _check_record(store, meeting.rank, attempt)
    return attempt


def _claim_and_tell(store: Store, meeting: Meeting) -> Attempt:
    try:
        create_root(store)
        attempt = _claim(store, meeting.world_size)
    except CkptdError as error:
        call = _Call(kind=type(error).__name__, reason=str(error))
        meeting.announce("attempt", msgspec.json.encode(call))
        raise
    call = _Call(ordinal=attempt.ordinal, token=attempt.token)
    meeting.announce("attempt", msgspec.json.encode(call))
    return attempt


def _claim(store: Store, world_size: int) -> Attempt:
    """Create the record with the next free ordinal; racing jobs each get their own."""
    token = secrets.token_hex(16)
    record = AttemptRecord(token, world_size, socket.gethostname(), _user(), os.getpid())
    taken = [keys.parse_attempt(entry.key) or 0 for entry in store.list(keys.ATTEMPTS)]
    ordinal = max(taken, default=0) + 1
    while ordinal <= keys.MAX_ATTEMPT:
        if _is_created(store, keys.attempt(ordinal), record):
            return Attempt(ordinal, token)
        ordinal += 1
    raise ConfigError(f"{store.url} has seen {keys.MAX_ATTEMPT} attempts; start a new root")


def _is_created(store: Store, key: str, record: AttemptRecord) -> bool:
    try:
        store.put_new(key, encode_record(record))
    except ObjectExistsError:
        return False
    return True


def read_attempt(store: Store, ordinal: int) -> AttemptRecord:
    """Read the record of an attempt.

    Raises:
        ObjectNotFoundError: there is none.
        CorruptError: it is damaged.
        StoreError: the store did not answer, or there is something larger in its place.
    """
    key = keys.attempt(ordinal)
    return decode_record(store.get(key, max_bytes=1 << 16), AttemptRecord, key=key)


def _check_record(store: Store, rank: int, attempt: Attempt) -> None:
    key = keys.attempt(attempt.ordinal)
    problem = "is not there"
    try:
        if read_attempt(store, attempt.ordinal).token == attempt.token:
            return
        problem = "is another job's"
    except ObjectNotFoundError:
        pass
    raise ConfigError(
        f"rank {rank} on {socket.gethostname()} does not see the root that rank 0 sees: {key} "
        f"{problem} in {store.url}. Use a path that is the same shared folder on every node, or an "
        "object store"
    )


def _same_error(call: _Call) -> CkptdError:
    kind = errors.class_named(call.kind)
    message = f"rank 0 could not start the attempt: {call.reason}"
    if issubclass(kind, errors.StoreError):
        return kind("", message)
    if issubclass(kind, errors.ConfigError):
        return kind(message)
    return MeetingError(message)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
