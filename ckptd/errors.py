"""Every error that ckptd raises, in one tree.

Each class says whether trying again may help (``retryable``) and which exit code the command line
ends with (``exit_code``). Facts are attributes; the message says what happened, to what, and what
to do next. "Not found" always means that the store answered: a store that cannot be reached raises
`StoreUnavailableError` instead, never a not-found error.
"""

from __future__ import annotations

from collections.abc import Iterable


class CkptdError(Exception):
    """Anything that ckptd raises on purpose."""

    retryable = False
    exit_code = 1


class ConfigError(CkptdError):
    """A setting, argument or environment that cannot work; nothing was touched."""

    exit_code = 2


class AlreadyServingError(ConfigError):
    """Another daemon holds the socket that this one was to serve on."""


def class_named(name: str) -> type[CkptdError]:
    """Return the class of this tree with that name, as another process sent it.

    What is not one of them, of a newer version perhaps, is just a `CkptdError`.
    """
    found = globals().get(name)
    if isinstance(found, type) and issubclass(found, CkptdError):
        return found
    return CkptdError


# --- handing a snapshot to the daemon ---------------------------------------------------------


class HandoffError(CkptdError):
    """A snapshot did not reach the daemon."""

    retryable = True
    exit_code = 6


class DaemonUnavailableError(HandoffError):
    """No daemon answers on the socket and none could be started."""


class SlotsBusyError(HandoffError):
    """Every slot still holds a snapshot that is not durable yet."""


class ProtocolError(HandoffError):
    """The other end sent something that is not the protocol; the connection is closed."""

    retryable = False


class SlotMovedError(HandoffError):
    """A slot was used again while its snapshot was being read; the snapshot is dropped."""

    retryable = False


# --- the store ---------------------------------------------------------------------------------


class StoreError(CkptdError):
    """An operation on the object `key` failed."""

    exit_code = 5

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{message}: {key}" if key else message)
        self.key = key


class ObjectNotFoundError(StoreError):
    """The store answered that `key` does not exist."""

    exit_code = 3


class ObjectExistsError(StoreError):
    """`key` exists already and `put_new` did not touch it."""


class StoreRefusedError(StoreError):
    """The store does not take the request as it is: a setting, not the object, is wrong."""


class StoreUnsupportedError(StoreRefusedError):
    """The service says that it does not know this kind of request."""


class BucketNotFoundError(StoreRefusedError):
    """There is no such bucket, or not at this endpoint and in this region."""


class StoreAccessDeniedError(StoreRefusedError):
    """The store refused: permissions, credentials, a read-only file system."""


class CredentialsError(StoreAccessDeniedError):
    """The store does not know who asks: credentials are missing, wrong or no longer valid."""


class StoreFullError(StoreError):
    """No space or quota is left. Nothing was stored under `key`."""


class StoreUnavailableError(StoreError):
    """The store did not answer, or answered that it cannot now; it may later."""

    retryable = True


# --- checkpoints -------------------------------------------------------------------------------


class CheckpointError(CkptdError):
    """A checkpoint cannot be made or used. `step` is None where it is not known."""

    exit_code = 4

    def __init__(self, message: str, *, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class CheckpointNotFoundError(CheckpointError):
    """The store answered that there is no such checkpoint."""

    exit_code = 3


class IncompleteError(CheckpointError):
    """Some ranks did not deliver: the step was not committed."""

    def __init__(self, message: str, *, step: int, missing_ranks: Iterable[int] = ()) -> None:
        super().__init__(message, step=step)
        self.missing_ranks = tuple(missing_ranks)


class CorruptError(CheckpointError):
    """A stored object is not what its hash, length or grammar says. `key` names it."""

    def __init__(self, message: str, *, key: str = "", step: int | None = None) -> None:
        super().__init__(f"{message}: {key}" if key else message, step=step)
        self.key = key


class UnsupportedFormatError(CheckpointError):
    """The root or the object was written in a format that this version does not know."""


class SaveFailedError(CheckpointError):
    """The step will never be committed; a tombstone says so in the store."""


class SaveSkippedError(SaveFailedError):
    """The step was left out because no slot was free on some rank (``on_busy="skip"``)."""


class StateChangedError(SaveFailedError):
    """The state was changed while it was being copied (``overlap=True``). `fqn` names a tensor.

    Found by samples, so a change that reaches none of them does not raise this.
    """

    def __init__(self, message: str, *, step: int | None = None, fqn: str = "") -> None:
        super().__init__(message, step=step)
        self.fqn = fqn


class SaveUnknownError(CheckpointError):
    """Time ran out before the outcome was known: the step may still be committed."""

    retryable = True


# --- layouts and restoring ---------------------------------------------------------------------


class LayoutError(CkptdError):
    """The state and the checkpoint, or the states of two ranks, do not fit. `fqn` names where."""

    exit_code = 7

    def __init__(self, message: str, *, fqn: str = "", ranks: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.fqn = fqn
        self.ranks = tuple(ranks)


class MissingTensorError(LayoutError):
    """The state wants something that the checkpoint does not hold."""


class ShapeMismatchError(LayoutError):
    """A tensor has another shape or dtype in the checkpoint than in the state."""


class ReplicaMismatchError(LayoutError):
    """Ranks hold different contents under one name."""


class UnsupportedValueError(LayoutError):
    """A value of the state has no safe stored form."""


class MeetingError(CkptdError):
    """The ranks of a job did not meet in time, or the store that they meet over is gone."""

    retryable = True
    exit_code = 8


class TornRestoreError(CkptdError):
    """Restoring stopped half way and no whole checkpoint is left: the live objects are unusable."""

    exit_code = 4
